//! The linter for placements: called by the planner itself, by tests, and by the operator before it proposes.

use foregate_api::ids::{Epoch, ExpertId, LayerId, Rank};
use foregate_api::placement::{LayerPlacement, Placement};

use crate::cover;
pub use crate::finding::{Finding, Severity};
use crate::layer::Layer;
use crate::problem::{Problem, Room};

/// By how much the predicted balance must fall to be worth telling.
const WORSE: f64 = 1e-3;

/// All findings about a placement for this problem. `in_force` is the placement it would follow, if any.
///
/// Findings come in the order of layers; a layer of the wrong shape is looked at no further.
#[must_use]
pub fn check(
    placement: &Placement,
    problem: &Problem,
    in_force: Option<&Placement>,
) -> Vec<Finding> {
    let room = Room::of(problem);
    let mut findings = Vec::new();
    let parent = in_force.map_or(Epoch(0), |p| p.epoch);
    if placement.parent != parent || placement.epoch <= parent {
        findings.push(Finding::Parent {
            epoch: placement.epoch,
            parent: placement.parent,
            in_force: parent,
        });
    }
    if placement.layers.len() != problem.layers {
        findings.push(Finding::Shape {
            layer: LayerId(placement.layers.len() as u32),
        });
    }
    if placement.ranks != room.ranks {
        findings.push(Finding::Ranks {
            found: placement.ranks.clone(),
        });
        return findings;
    }
    let needed = problem.experts + room.ranks.len() - 1;
    if room.total() < needed {
        findings.push(Finding::FewCopies {
            copies: room.total(),
            needed,
        });
    }
    for (l, layer) in placement.layers.iter().enumerate() {
        let id = LayerId(l as u32);
        if let Some(dense) = check_layer(id, layer, &room, problem.experts, &mut findings) {
            findings.extend(uncovered(id, &dense, problem, &room, in_force));
        }
    }
    if in_force.is_some() && placement.balance_after < placement.balance_before - WORSE {
        findings.push(Finding::WorseThanParent {
            before: placement.balance_before,
            after: placement.balance_after,
        });
    }
    findings
}

/// Experts of a layer that lack a failure domain by what was asked for; more than before by what slots allow.
fn uncovered(
    id: LayerId,
    layer: &Layer,
    problem: &Problem,
    room: &Room,
    in_force: Option<&Placement>,
) -> Option<Finding> {
    let asked = Room {
        cover: problem.cover,
        ..room.clone()
    };
    let open: Vec<usize> = cover::open(&asked, layer).collect();
    if open.is_empty() {
        return None;
    }
    let now = cover::open(room, layer).count();
    let same = in_force.filter(|p| p.ranks == room.ranks && id.index() < p.layers.len());
    let before = same.map(|p| {
        let old = Layer::adopt(p, id.index(), room, problem.experts);
        cover::open(room, &old).count()
    });
    let demand = problem
        .demand
        .get(id.index())
        .map_or(&[][..], Vec::as_slice);
    let rows: f64 = open.iter().filter_map(|e| demand.get(*e)).sum();
    let total: f64 = demand.iter().sum();
    Some(Finding::Uncovered {
        layer: id,
        experts: open.len(),
        rows: if total > 0.0 { rows / total } else { 0.0 },
        more: before.map_or(0, |before| now.saturating_sub(before)),
    })
}

/// Whether any finding forbids the placement.
#[must_use]
pub fn refused(findings: &[Finding]) -> bool {
    findings.iter().any(|f| f.severity() == Severity::Refuse)
}

fn check_layer(
    id: LayerId,
    layer: &LayerPlacement,
    room: &Room,
    experts: usize,
    findings: &mut Vec<Finding>,
) -> Option<Layer> {
    if layer.slots.len() != room.ranks.len() || layer.copies.len() != experts {
        findings.push(Finding::Shape { layer: id });
        return None;
    }
    let before = findings.len();
    for (g, held) in layer.slots.iter().enumerate() {
        check_rank(id, held, (room.ranks[g], room.slots[g]), experts, findings);
    }
    if findings[before..]
        .iter()
        .any(|f| matches!(f, Finding::UnknownExpert { .. }))
    {
        return None;
    }
    let slots: Vec<Vec<usize>> = layer
        .slots
        .iter()
        .map(|held| held.iter().map(|e| e.index()).collect())
        .collect();
    let dense = Layer::from_slots(&slots, experts);
    for (e, copies) in layer.copies.iter().enumerate() {
        let expert = ExpertId(e as u32);
        let homes = dense.hosts(e).iter().map(|g| room.ranks[*g]);
        let sum: f64 = copies.iter().map(|copy| f64::from(copy.share)).sum();
        if dense.count(e) == 0 {
            findings.push(Finding::NoCopy { layer: id, expert });
        } else if !copies.iter().map(|copy| copy.rank).eq(homes) {
            findings.push(Finding::CopiesDiffer { layer: id, expert });
        } else if copies.iter().any(|c| c.share < 0.0) || !within(sum, 1.0, 1e-6) {
            findings.push(Finding::Shares {
                layer: id,
                expert,
                sum,
            });
        }
    }
    let (found, least) = (dense.components(), dense.least_components());
    if found > least {
        findings.push(Finding::Components {
            layer: id,
            found,
            least,
        });
    }
    Some(dense)
}

/// Whether x is close to y; what is not a number is close to nothing.
fn within(x: f64, y: f64, by: f64) -> bool {
    (x - y).abs() <= by
}

fn check_rank(
    id: LayerId,
    held: &[ExpertId],
    (rank, slots): (Rank, usize),
    experts: usize,
    findings: &mut Vec<Finding>,
) {
    if held.len() > slots {
        findings.push(Finding::TooManySlots {
            layer: id,
            rank,
            used: held.len(),
            slots,
        });
    }
    let mut sorted = held.to_vec();
    sorted.sort_unstable();
    for expert in sorted.iter().filter(|e| e.index() >= experts) {
        findings.push(Finding::UnknownExpert {
            layer: id,
            rank,
            expert: *expert,
        });
    }
    for pair in sorted.windows(2).filter(|pair| pair[0] == pair[1]) {
        findings.push(Finding::Double {
            layer: id,
            rank,
            expert: pair[0],
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{RankSlots, Settings, initial};

    fn problem() -> Problem {
        let rank = |r: u32| RankSlots {
            rank: Rank(r),
            slots: 3,
            domain: String::new(),
        };
        Problem::uniform(vec![rank(0), rank(1)], 1, 4)
    }

    fn good() -> Placement {
        initial(&problem(), &Settings::default()).unwrap().0
    }

    #[test]
    fn a_good_plan_has_no_findings() {
        assert_eq!(check(&good(), &problem(), None), []);
    }

    #[test]
    fn each_defect_is_found() {
        let cases: Vec<(fn(&mut Placement), fn(&Finding) -> bool)> = vec![
            (
                |p| p.ranks[1] = Rank(5),
                |f| matches!(f, Finding::Ranks { .. }),
            ),
            (|p| p.layers.clear(), |f| matches!(f, Finding::Shape { .. })),
            (
                |p| p.layers[0].copies.truncate(2),
                |f| matches!(f, Finding::Shape { .. }),
            ),
            (
                |p| p.layers[0].slots[0].clear(),
                |f| matches!(f, Finding::NoCopy { .. }),
            ),
            (
                |p| p.layers[0].slots[0][0] = ExpertId(9),
                |f| {
                    matches!(
                        f,
                        Finding::UnknownExpert {
                            expert: ExpertId(9),
                            ..
                        }
                    )
                },
            ),
            (
                |p| p.layers[0].slots[0] = (0..4).map(ExpertId).collect(),
                |f| {
                    matches!(
                        f,
                        Finding::TooManySlots {
                            used: 4,
                            slots: 3,
                            ..
                        }
                    )
                },
            ),
            (
                |p| p.layers[0].copies[0].clear(),
                |f| matches!(f, Finding::CopiesDiffer { .. }),
            ),
            (
                |p| p.layers[0].copies[0][0].share += 0.1,
                |f| matches!(f, Finding::Shares { .. }),
            ),
            (
                |p| p.parent = Epoch(3),
                |f| matches!(f, Finding::Parent { .. }),
            ),
            (
                |p| p.epoch = Epoch(0),
                |f| matches!(f, Finding::Parent { .. }),
            ),
        ];
        for (i, (spoil, expected)) in cases.iter().enumerate() {
            let mut plan = good();
            spoil(&mut plan);
            let findings = check(&plan, &problem(), None);
            assert!(findings.iter().any(expected), "case {i}: {findings:?}");
            assert!(refused(&findings), "case {i}: {findings:?}");
        }
    }

    #[test]
    fn islands_and_doubles_are_reported_not_refused() {
        let ids = |x: &[u32]| x.iter().copied().map(ExpertId).collect::<Vec<_>>();
        let mut plan = good();
        let slots = vec![ids(&[0, 1, 1]), ids(&[2, 3, 3])];
        plan.layers[0] = LayerPlacement::from_slots(&plan.ranks, slots, 4);
        let findings = check(&plan, &problem(), None);
        assert!(!refused(&findings));
        assert_eq!(
            findings.len(),
            2,
            "two doubles; four real copies cannot link: {findings:?}"
        );
        let slots = vec![ids(&[0, 1]), ids(&[2, 3])];
        plan.layers[0] = LayerPlacement::from_slots(&plan.ranks, slots, 4);
        assert_eq!(check(&plan, &problem(), None), []);
    }
}
