use tempfile::TempDir;

use super::*;

fn nothing() -> Seen {
    Seen {
        around: Around::Machine,
        on_bus: 0,
        module: None,
        nodes: Vec::new(),
        probe: Probe {
            driver: Err("libcuda.so.1 cannot be opened".to_owned()),
            cards: Err("no driver".to_owned()),
        },
        code: Vec::new(),
        nccl: Err("NCCL cannot be opened".to_owned()),
        shared_memory: Some(64 << 20),
        visible: None,
        toolkit: false,
    }
}

fn node(name: &str) -> Node {
    Node {
        name: name.to_owned(),
        closed: None,
    }
}

fn good() -> Seen {
    Seen {
        around: Around::Pod,
        on_bus: 1,
        module: Some("580.95.05".to_owned()),
        nodes: ["nvidia-uvm", "nvidia0", "nvidiactl"].map(node).to_vec(),
        probe: Probe {
            driver: Ok((13, 0)),
            cards: Ok(vec![CardInfo {
                name: "NVIDIA H200".to_owned(),
                capability: (9, 0),
                memory: 141 << 30,
            }]),
        },
        code: vec!["sm_80".to_owned(), "sm_90a".to_owned()],
        nccl: Ok(FLOOR),
        shared_memory: Some(8 << 30),
        visible: None,
        toolkit: false,
    }
}

fn line<'a>(checks: &'a [Check], name: &str) -> &'a Check {
    let mut found = checks.iter().filter(|check| check.name == name);
    let first = found
        .next()
        .unwrap_or_else(|| panic!("no line {name}: {checks:#?}"));
    assert!(found.next().is_none(), "two lines {name}");
    assert!(!first.finding.contains('\n'), "{}", first.finding);
    first
}

#[test]
fn a_good_node_has_nothing_to_say_but_ok() {
    for check in checks(&good(), true) {
        assert_eq!(check.verdict, Verdict::Ok, "{}", check.line());
    }
}

#[test]
fn without_a_card_nothing_fails_unless_one_is_wanted() {
    for check in checks(&nothing(), false) {
        assert_eq!(check.verdict, Verdict::Ok, "{}", check.line());
    }
    let wanted = checks(&nothing(), true);
    for name in ["card", "driver", "code"] {
        assert_eq!(line(&wanted, name).verdict, Verdict::Fail, "{name}");
    }
}

/// Each thing that lacks alone is one line that is not OK, and the line says what to do.
#[test]
fn each_thing_that_lacks_is_one_line_with_its_remedy() {
    type Break = fn(&mut Seen);
    let cases: [(Break, &str, &str); 13] = [
        (|s| s.code.clear(), "code", "--features cuda"),
        (
            |s| s.probe.driver = Err("no libcuda".into()),
            "driver",
            "NVIDIA_DRIVER_CAPABILITIES",
        ),
        (|s| s.probe.driver = Ok((12, 4)), "driver", "580 or newer"),
        (
            |s| s.probe.cards = Err("initialisation failed (999)".into()),
            "driver",
            "same version",
        ),
        (
            |s| s.probe.cards.as_mut().unwrap()[0].capability = (7, 5),
            "card",
            "8.0 or newer",
        ),
        (
            |s| s.nodes[1].closed = Some(io::ErrorKind::PermissionDenied),
            "devices",
            "nvidia.com/gpu",
        ),
        (
            |s| drop(s.nodes.remove(1)),
            "devices",
            "limits nvidia.com/gpu: 1",
        ),
        (|s| drop(s.nodes.remove(0)), "devices", "nvidia-modprobe -u"),
        (|s| s.shared_memory = Some(64 << 20), "shm", "medium Memory"),
        (|s| s.shared_memory = None, "shm", "no /dev/shm"),
        (
            |s| s.visible = Some("void".into()),
            "runtime",
            "device plugin",
        ),
        (
            |s| {
                s.around = Around::Machine;
                s.toolkit = false;
            },
            "runtime",
            "nvidia-ctk runtime configure",
        ),
        (
            |s| {
                s.nccl = Err("NCCL cannot be opened".into());
                let second = s.probe.cards.as_ref().unwrap()[0].clone();
                s.probe.cards.as_mut().unwrap().push(second);
            },
            "nccl",
            "--nccl-library",
        ),
    ];
    for (number, (change, name, remedy)) in cases.into_iter().enumerate() {
        let mut seen = good();
        change(&mut seen);
        let checks = checks(&seen, true);
        let check = line(&checks, name);
        assert_ne!(
            check.verdict,
            Verdict::Ok,
            "case {number}: {}",
            check.line()
        );
        assert!(
            check.finding.contains(remedy),
            "case {number}: {}",
            check.line()
        );
        // No card can be told of without a working driver, so its line may say so too.
        let others = checks
            .iter()
            .filter(|other| other.verdict != Verdict::Ok && other.name != name);
        let others: Vec<&str> = others.map(|other| other.name).collect();
        assert!(
            others.is_empty() || others == ["card"],
            "case {number}: {others:?}"
        );
    }
}

#[test]
fn a_card_without_a_driver_is_told_from_no_card() {
    let mut seen = nothing();
    seen.on_bus = 8;
    let checks = checks(&seen, false);
    assert_eq!(line(&checks, "card").verdict, Verdict::Warn);
    let driver = line(&checks, "driver");
    assert_eq!(driver.verdict, Verdict::Warn);
    assert!(
        driver.finding.contains("install NVIDIA's driver"),
        "{}",
        driver.finding
    );
}

#[test]
fn one_card_needs_no_nccl() {
    let mut seen = good();
    seen.nccl = Err("NCCL cannot be opened".into());
    assert_eq!(line(&checks(&seen, true), "nccl").verdict, Verdict::Ok);
}

/// As Linux, the driver and container runtimes write them.
#[test]
fn files_are_read() {
    let folder = TempDir::new().unwrap();
    let write = |path: &str, text: &str| {
        let path = folder.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    };
    let files = Files {
        root: folder.path(),
    };
    assert_eq!(
        (files.on_bus(), files.module(), files.nodes().len()),
        (0, None, 0)
    );
    assert_eq!(files.around(false), Around::Machine);
    assert_eq!(files.around(true), Around::Pod);
    assert!(!files.toolkit());

    for (slot, vendor, class) in [
        ("0000:01:00.0", "0x10de\n", "0x030200\n"),
        ("0000:01:00.1", "0x10de\n", "0x040300\n"),
        ("0000:02:00.0", "0x8086\n", "0x030000\n"),
    ] {
        write(&format!("sys/bus/pci/devices/{slot}/vendor"), vendor);
        write(&format!("sys/bus/pci/devices/{slot}/class"), class);
    }
    assert_eq!(files.on_bus(), 1);
    let old = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19 18:56:32 UTC 2023\nGCC version:\n";
    write("proc/driver/nvidia/version", old);
    assert_eq!(files.module().as_deref(), Some("535.129.03"));
    let open =
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build\n";
    write("proc/driver/nvidia/version", open);
    assert_eq!(files.module().as_deref(), Some("580.95.05"));
    for name in [
        "nvidia0",
        "nvidia12",
        "nvidiactl",
        "nvidia-uvm",
        "nvidia-uvm-tools",
        "null",
    ] {
        write(&format!("dev/{name}"), "");
    }
    let names: Vec<String> = files.nodes().into_iter().map(|node| node.name).collect();
    assert_eq!(names, ["nvidia-uvm", "nvidia0", "nvidia12", "nvidiactl"]);
    assert!(files.nodes().iter().all(|node| node.closed.is_none()));
    write(".dockerenv", "");
    assert_eq!(files.around(false), Around::Container);
    write("etc/cdi/nvidia.yaml", "");
    assert!(files.toolkit());
}

#[test]
fn shared_memory_is_what_its_mount_says() {
    let cases = [
        (
            "shm /dev/shm tmpfs rw,nosuid,nodev,noexec,relatime,size=65536k 0 0",
            Some(64 << 20),
        ),
        (
            "tmpfs /dev/shm tmpfs rw,nosuid,nodev,inode64 0 0",
            Some(8 << 30),
        ),
        ("tmpfs /dev/shm tmpfs rw,size=2g 0 0", Some(2 << 30)),
        ("tmpfs /dev/shm tmpfs rw,size=4096 0 0", Some(4096)),
        ("tmpfs /run tmpfs rw,size=1k 0 0", None),
    ];
    for (mounts, expected) in cases {
        assert_eq!(shared_memory(mounts, Some(16 << 30)), expected, "{mounts}");
    }
    let twice = "tmpfs /dev/shm tmpfs rw,size=1g 0 0\ntmpfs /dev/shm tmpfs rw,size=2g 0 0\n";
    assert_eq!(shared_memory(twice, None), Some(2 << 30), "the upper one");
}

/// Whatever machine this is, looking at it neither fails nor panics.
#[test]
fn this_machine_is_looked_at() {
    let seen = Seen::look(Some(Path::new("/nonexistent/libnccl.so.2")));
    assert!(
        seen.nccl
            .as_ref()
            .is_err_and(|why| why.contains("/nonexistent")),
        "{seen:?}"
    );
    let lines = checks(&seen, false);
    assert!(lines.len() >= 5, "{lines:#?}");
    assert!(
        lines.iter().all(|check| check.verdict != Verdict::Fail),
        "{lines:#?}"
    );
}
