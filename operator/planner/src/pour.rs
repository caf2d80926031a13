//! One expert's rows onto its hosts: the step that planner and workers share.

/// Takes the rows of one expert off its hosts and pours them anew, lowest level first.
///
/// `hosts` and `flow` run over the expert's copies; `order` is scratch.
pub(crate) fn pour(
    loads: &mut [f64],
    hosts: &[u32],
    flow: &mut [f64],
    rows: f64,
    order: &mut Vec<f64>,
) {
    if let ([a, b], [x, y]) = (hosts, &mut *flow) {
        // Two copies, the common case: half the rows plus half the gap of the levels.
        let (a, b) = (*a as usize, *b as usize);
        let (low, high) = (loads[a] - *x, loads[b] - *y);
        let first = ((rows + high - low) * 0.5).clamp(0.0, rows);
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
