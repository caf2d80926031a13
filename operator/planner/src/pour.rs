//! One expert's rows onto its hosts: the step that planner and workers share.

/// Over-relaxation of the planner's sweeps: each pour of an expert with two copies goes this much of the way. On the
/// tree-like graphs of linked ranks that takes a fraction of the sweeps (successive over-relaxation, which converges
/// for convex quadratics with bounds for every factor in (0, 2): Cryer 1971).
pub(crate) const RELAXATION: f64 = 1.6;

/// Takes the rows of one expert off its hosts and pours them anew, lowest level first.
///
/// `hosts` and `flow` run over the expert's copies; `order` is scratch. With `relaxation` 1 the expert's rows are level
/// afterwards; with more they go beyond, within their bounds, if there are two copies.
pub(crate) fn pour(
    loads: &mut [f64],
    hosts: &[u32],
    flow: &mut [f64],
    rows: f64,
    relaxation: f64,
    order: &mut Vec<f64>,
) {
    if let ([a, b], [x, y]) = (hosts, &mut *flow) {
        // Two copies, the common case: half the rows plus half the gap of the levels.
        let (a, b) = (*a as usize, *b as usize);
        let (low, high) = (loads[a] - *x, loads[b] - *y);
        let level = (rows + high - low) * 0.5;
        let first = (*x + relaxation * (level - *x)).clamp(0.0, rows);
        (*x, *y) = (first, rows - first);
        loads[a] = low + *x;
        loads[b] = high + *y;
        return;
    }
    for (host, y) in hosts.iter().zip(flow.iter()) {
        loads[*host as usize] -= y;
    }
    order.clear();
    for host in hosts {
        let level = loads[*host as usize];
        let at = order.iter().rposition(|x| *x <= level).map_or(0, |i| i + 1);
        order.insert(at, level);
    }
    let (mut need, mut level, mut filled) = (rows, order[0], 1_usize);
    for next in order.iter().skip(1) {
        let step = (next - level) * filled as f64;
        if step >= need {
            break;
        }
        need -= step;
        level = *next;
        filled += 1;
    }
    level += need / filled as f64;
    for (host, y) in hosts.iter().zip(flow.iter_mut()) {
        let load = &mut loads[*host as usize];
        *y = (level - *load).max(0.0);
        *load += *y;
    }
}
