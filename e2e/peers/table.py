"""The part of README.md that a run writes: between two marks, the rest is left alone."""

BEGIN, END = "<!-- begin: written by `make bench-peers` -->", "<!-- end: written by `make bench-peers` -->"
FORMATS = [("bf16", "bfloat16"), ("int8", "int8 (llama.cpp: Q8_0)"), ("int4", "int4 (llama.cpp: Q4_0)")]


def number(value):
    return f"{value:.2f}" if value < 10 else f"{value:,.0f}" if value >= 1000 else f"{value:.1f}"


def cell(speeds, ratios, row):
    """A peer's figure and ours over it; a row that it was too slow for is left open."""
    return f" {number(speeds[row])} | {ratios[row]:.2f} |" if row in speeds else " – | – |"


def engine_table(record, form):
    medians, ratios = record["medians"], record["ratios"]
    ours = f"Foregate {form}"
    if ours not in medians:
        return [f"Foregate did not run with {form}."]
    peers = [peer for peer in ratios if peer.endswith(f" {form}")]
    head = "".join(f" {peer.rsplit(' ', 1)[0]} | Foregate / {peer.rsplit(' ', 1)[0]} |" for peer in peers)
    lines = [f"| | Foregate |{head}", "|---|---|" + "---|---|" * len(peers)]
    for row, value in medians[ours].items():
        cells = "".join(cell(medians[peer], ratios[peer], row) for peer in peers)
        lines.append(f"| {row} | {number(value)} |{cells}")
    return lines


def medians_of(record):
    rounds = len(record["rounds"])
    return "one round" if rounds == 1 else f"medians of {rounds} rounds"


def failures(record):
    names = {name for turns in record["rounds"] for name, turn in turns.items() if turn is None}
    return [f"Did not run: {', '.join(sorted(names))}.", ""] if names else []


def limits(record):
    shares = {}
    for turns in record["rounds"]:
        for name, turn in turns.items():
            for one in (turn or {"figures": {"decode": []}})["figures"]["decode"]:
                if "limit_share" in one:
                    shares.setdefault((name.rsplit(" ", 1)[1], one["batch"]), []).append(one["limit_share"])
    if not shares:
        return []
    lines = ["Foregate's share of what the bandwidth of the same run allows, lowest and highest of the rounds:", ""]
    lines += ["| | " + " | ".join(f"batch {batch}" for batch in sorted({key[1] for key in shares})) + " |"]
    lines += ["|---|" + "---|" * len({key[1] for key in shares})]
    for form in [form for form, _ in FORMATS if any(key[0] == form for key in shares)]:
        cells = [shares[key] for key in sorted(shares) if key[0] == form]
        lines.append(f"| {form} | " + " | ".join(f"{min(c):.2f} to {max(c):.2f}" for c in cells) + " |")
    return [*lines, ""]


def serving_table(record):
    serving = record["serving"]
    lines = ["| offered requests/s (came) | server | answered/s | good/s | tokens/s | first token p50, p99 | between tokens p50, p99 |"]
    lines += ["|---|---|---|---|---|---|---|"]
    rows = []
    for name, server in serving["servers"].items():
        for run in server["runs"] or []:
            first, between = run["time_to_first_token_ms"], run["inter_token_latency_ms"]
            cells = [f"{run['requests_per_second']:.2f}", f"{run['goodput_per_second']:.2f}", f"{run['tokens_per_second']:.1f}"]
            cells += [f"{first['p50']:.0f}, {first['p99']:.0f} ms", f"{between['p50']:.0f}, {between['p99']:.0f} ms"]
            failed = f" ({run['failed']} failed)" if run["failed"] else ""
            rate = (run["offered_per_second"], f"{run['arrived_per_second']:.2f}")
            rows.append((rate, name, [name + failed, *cells]))
    for (rate, came), _, cells in sorted(rows, key=lambda row: row[:2]):
        lines.append(f"| {rate:g} ({came}) | " + " | ".join(cells) + " |")
    ready = ", ".join(
        f"{name} {server['ready_seconds']:.1f} s" if server["ready_seconds"] else f"{name} did not start"
        for name, server in serving["servers"].items()
    )
    return [*lines, "", f"From start to the first token of an answer: {ready}."]


def section(record):
    machine = record["machine"]
    low, middle, high = record["bandwidth_gb_s"] or (0, 0, 0)
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    lines = [
        f"{record['date']}, `{record['command']}`. {machine['processor']} (family/model {machine['family_model']}), "
        f"{machine['cores']} cores, {machine['memory_gb']} GB; {', '.join(machine['flags'])}. Memory read at "
        f"{low:.1f}, {middle:.1f}, {high:.1f} GB/s (lowest, median, highest of Foregate's turns). Load average before the run: "
        f"{machine['load_average_before']:.1f}.",
        "",
        f"Versions: {versions}.",
        "",
        "![Tokens per second of each engine](peers.svg)",
        "",
        *failures(record),
    ]
    for form, title in FORMATS:
        lines += [f"**{title}**, {medians_of(record)}, tokens per second unless said otherwise:", ""]
        lines += [*engine_table(record, form), ""]
    lines += limits(record)
    lines += ["Through HTTP, bfloat16:", "", *serving_table(record)]
    return "\n".join(lines)


def write(path, record):
    text = path.read_text() if path.exists() else f"{BEGIN}\n{END}\n"
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    path.write_text(f"{before}{BEGIN}\n\n{section(record)}\n\n{END}{after}")
