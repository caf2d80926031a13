//! Bytes between nodes: how many other nodes a token is sent to in a layer, by placement and by choice of copy.
//!
//! One send per node, forwarded inside of it: 8-bit rows with scales on the way there, 16-bit rows back.

use foregate_api::placement::{LayerPlacement, Placement};
use foregate_planner::split::balance;
use foregate_planner::{Problem, initial, initial_near};

use crate::dice::Dice;
use crate::homes::even_loads;
use crate::judge::solved_rows;
use crate::policy::{Policy, anchor, ranks_with_slots};
use crate::run::{Case, SimulateError, Watch};
use crate::shape::Shape;
use crate::sums::mean;
use crate::tokens::{LAYERS, Token, Tokens, rows};

/// The generator's streams end at 5.
const STREAM: u64 = 6;
/// Bytes per value there and back.
const BYTES: f64 = 1.03 + 2.0;

/// Planners that are compared: those that place once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Planner {
    Eplb,
    EplbHierarchical,
    /// The operator's first plan. It knows nodes as failure domains, not which experts are used together.
    Connected,
    /// The same with the tokens that were seen.
    NodeAware,
}

impl Planner {
    const ALL: [Self; 4] = [
        Self::Eplb,
        Self::EplbHierarchical,
        Self::Connected,
        Self::NodeAware,
    ];

    const fn name(self) -> &'static str {
        match self {
            Self::Eplb => "eplb",
            Self::EplbHierarchical => "eplb-hierarchical",
            Self::Connected => "connected",
            Self::NodeAware => "node-aware",
        }
    }

    fn fits(self, shape: &Shape) -> bool {
        self != Self::EplbHierarchical || Policy::EplbHierarchical10.fits(shape).is_ok()
    }
}

/// One seed: a row per policy that fits.
#[derive(Debug)]
pub struct InternodeOutcome {
    pub(crate) seed: u64,
    pub(crate) policies: Vec<Visits>,
}

/// One policy; means over layers.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Visits {
    pub(crate) name: &'static str,
    /// Other nodes per token if copies are chosen at random.
    pub(crate) random: f64,
    /// The same if copies near the token come first.
    pub(crate) local_first: f64,
    pub(crate) even: f64,
    pub(crate) split: f64,
}

/// Policies of this comparison in this setting.
///
/// # Errors
/// If there is one node only.
pub fn internode_policies(shape: &Shape) -> Result<Vec<&'static str>, SimulateError> {
    if shape.nodes < 2 {
        return Err(SimulateError::OneNode {
            setting: shape.name,
        });
    }
    let fit = Planner::ALL
        .into_iter()
        .filter(|planner| planner.fits(shape));
    Ok(fit.map(Planner::name).collect())
}

/// Bytes of a token's visit of a node, there and back.
pub(crate) fn bytes_per_visit(shape: &Shape) -> f64 {
    shape.hidden as f64 * BYTES
}

/// Runs one seed: placements are made from some tokens and judged on others.
///
/// # Errors
/// A setting with one node, or a planner that refuses.
pub fn internode(
    case: &Case,
    seed: u64,
    watch: &dyn Watch,
) -> Result<InternodeOutcome, SimulateError> {
    case.validate()?;
    internode_policies(&case.shape)?;
    let shape = Shape {
        layers: LAYERS,
        ..case.shape
    };
    let mut dice = Dice::new(seed, STREAM);
    let tokens: Vec<Tokens> = (0..LAYERS)
        .map(|layer| Tokens::draw(&shape, layer, &mut dice))
        .collect();
    // Half a row more: an expert that nobody used is placed as well.
    let load = |tokens: &Tokens| -> Vec<f64> {
        let seen = rows(&tokens.seen, shape.experts);
        seen.into_iter().map(|rows| rows + 0.5).collect()
    };
    let load: Vec<Vec<f64>> = tokens.iter().map(load).collect();
    let mut policies = Vec::new();
    let fit = |planner: &Planner| planner.fits(&shape);
    for planner in Planner::ALL.into_iter().filter(fit) {
        let placement = match planner {
            Planner::Eplb => anchor(&shape, &load, false),
            Planner::EplbHierarchical => anchor(&shape, &load, true),
            Planner::Connected => initial(&problem(&shape, &load, case), &case.settings)?.0,
            Planner::NodeAware => {
                let seen: Vec<_> = tokens.iter().map(|tokens| tokens.seen.clone()).collect();
                initial_near(&problem(&shape, &load, case), &case.settings, &seen)?.0
            }
        };
        policies.push(judge(planner, &shape, &placement, &tokens, &mut dice)?);
        watch.step();
    }
    Ok(InternodeOutcome { seed, policies })
}

fn problem(shape: &Shape, load: &[Vec<f64>], case: &Case) -> Problem {
    Problem {
        demand: load.to_vec(),
        cover: case.cover,
        ..Problem::uniform(ranks_with_slots(shape), shape.layers, shape.experts)
    }
}

fn judge(
    planner: Planner,
    shape: &Shape,
    placement: &Placement,
    tokens: &[Tokens],
    dice: &mut Dice,
) -> Result<Visits, SimulateError> {
    let mut figures: [Vec<f64>; 4] = Default::default();
    for (l, tokens) in tokens.iter().enumerate() {
        let layer = &placement.layers[l];
        let homes = Homes::of(layer, shape);
        let rows = rows(&tokens.judged, shape.experts);
        let each = |of: &mut dyn FnMut(&Token, usize) -> usize| {
            let both = tokens.judged.iter().zip(&tokens.source);
            let sum: usize = both.map(|(token, source)| of(token, *source)).sum();
            sum as f64 / tokens.judged.len() as f64
        };
        figures[0].push(each(&mut |token, source| homes.random(token, source, dice)));
        figures[1].push(each(&mut |token, source| homes.local_first(token, source)));
        figures[2].push(balance(&even_loads(layer, &rows)));
        figures[3].push(solved_rows(placement, l, &rows)?);
    }
    let [random, local_first, even, split] = figures.map(|of| mean(&of));
    Ok(Visits {
        name: planner.name(),
        random,
        local_first,
        even,
        split,
    })
}

/// Nodes that hold each expert, ascending.
struct Homes {
    of: Vec<Vec<usize>>,
    nodes: usize,
}

impl Homes {
    fn of(layer: &LayerPlacement, shape: &Shape) -> Self {
        let nodes = |copies: &Vec<foregate_api::placement::Copy>| {
            let mut nodes: Vec<usize> = copies
                .iter()
                .map(|copy| shape.node(copy.rank.index()))
                .collect();
            nodes.dedup();
            nodes
        };
        Self {
            of: layer.copies.iter().map(nodes).collect(),
            nodes: shape.nodes,
        }
    }

    /// Other nodes that a token is sent to if each of its experts takes any node that has it.
    fn random(&self, token: &Token, source: usize, dice: &mut Dice) -> usize {
        let mut seen = vec![false; self.nodes];
        for expert in token {
            let homes = &self.of[*expert];
            let at = (dice.uniform() * homes.len() as f64) as usize;
            seen[homes[at.min(homes.len() - 1)]] = true;
        }
        seen[source] = false;
        seen.into_iter().filter(|seen| *seen).count()
    }

    /// The same if the token's own node comes first, then nodes that are the only home of an expert, then nodes that
    /// are visited already, then the node that has the most of what is left.
    fn local_first(&self, token: &Token, source: usize) -> usize {
        let mut seen = vec![false; self.nodes];
        seen[source] = true;
        for expert in token {
            if let [only] = self.of[*expert][..] {
                seen[only] = true;
            }
        }
        let has =
            |expert: &usize, seen: &[bool]| self.of[*expert].iter().any(|node| seen[*node]);
        let mut left: Vec<usize> = token
            .iter()
            .copied()
            .filter(|expert| !has(expert, &seen))
            .collect();
        while !left.is_empty() {
            let count =
                |node: usize| left.iter().filter(|e| self.of[**e].contains(&node)).count();
            let most =
                (0..self.nodes).max_by_key(|node| (count(*node), std::cmp::Reverse(*node)));
            let Some(node) = most else { break };
            seen[node] = true;
            left.retain(|expert| !self.of[*expert].contains(&node));
        }
        seen.into_iter().filter(|seen| *seen).count() - 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn visits_by_hand() {
        let homes = Homes {
            of: vec![vec![0], vec![1, 2], vec![2, 3], vec![3], vec![1, 2]],
            nodes: 4,
        };
        // From node 0: expert 0 is at home; 1, 2 and 4 all find a copy on node 2.
        assert_eq!(homes.local_first(&vec![0, 1, 2, 4], 0), 1);
        // Expert 3 forces node 3, which has 2 as well; 1 still needs node 1 or 2.
        assert_eq!(homes.local_first(&vec![1, 2, 3], 0), 2);
        // From node 2 only expert 3 is away.
        assert_eq!(homes.local_first(&vec![1, 2, 3, 4], 2), 1);
        let mut dice = Dice::new(0, 0);
        assert_eq!(homes.random(&vec![0, 3], 0, &mut dice), 1);
    }
}
