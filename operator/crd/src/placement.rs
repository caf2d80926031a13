//! `ExpertPlacement`: where a cluster's experts are. Owned by its `MoeCluster`, written once per epoch.

use foregate_api::ids::{ExpertId, Rank};
use foregate_api::manifest::BalancingSpec;
use foregate_api::placement::{LayerPlacement, Placement};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
    CustomResourceColumnDefinition, CustomResourceDefinition,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::schema::{self, Kind, SchemaError};

/// Where a cluster's experts are.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ExpertPlacement {
    /// `apiVersion` and `kind`.
    #[serde(flatten, default)]
    #[schemars(skip)]
    pub types: Option<kube::core::TypeMeta>,
    /// Name (that of the cluster) and owner.
    #[schemars(skip)]
    pub metadata: ObjectMeta,
    /// The policy. Written by the operator from the cluster's manifest.
    pub spec: ExpertPlacementSpec,
    /// The active placement.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<ExpertPlacementStatus>,
}

crate::resource!(ExpertPlacement, "expertplacements");

/// The policy.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ExpertPlacementSpec {
    /// Name of the `MoeCluster`.
    pub cluster: String,
    /// How experts are kept in balance.
    #[serde(default)]
    pub balancing: BalancingSpec,
}

/// The active placement.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ExpertPlacementStatus {
    /// Its number.
    pub epoch: i64,
    /// Number of the placement it was made from; 0 for the first.
    pub parent: i64,
    /// Why it was made: `initial`, `reweigh`, `move`, `repair` or `resize`.
    pub reason: String,
    /// Predicted balance (mean over maximum load, mean over layers) of its parent under the demand planned for.
    pub balance_before: f64,
    /// The same of this placement.
    pub balance_after: f64,
    /// Copies that were loaded to come from the parent to this placement: what the move cost. Absent if the operator did
    /// not see the parent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub copies_moved: Option<i64>,
    /// What the planner does next if the load stays as it was predicted when this placement was made. Absent if nothing
    /// follows soon, or if that is not recorded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<NextMove>,
    /// Number of MoE layers.
    pub layers: i32,
    /// What each rank holds.
    pub homes: Vec<RankHomes>,
}

/// A change of the placement that is predicted.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct NextMove {
    /// Load windows until then, 1 for the next.
    pub windows: i32,
    /// `move`, if copies move, or `reweigh`, if shares change only.
    pub verdict: String,
    /// Copies to load.
    pub copies: i64,
    /// The MoE layers that change, ascending.
    pub layers: Vec<i32>,
    /// Predicted balance before, mean over layers.
    pub balance_before: f64,
    /// Predicted balance after, mean over layers.
    pub balance_after: f64,
}

/// What a rank holds.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RankHomes {
    /// The rank.
    pub rank: u32,
    /// Its experts, one text per MoE layer, as numbers and ranges: `0-7,12`. Layers with the same experts as the layer
    /// before have `=`.
    pub experts: Vec<String>,
}

impl ExpertPlacementStatus {
    /// The status of an active placement, with what it moved if that is known.
    #[must_use]
    pub fn of(plan: &Placement, copies_moved: Option<usize>, next: Option<NextMove>) -> Self {
        let number = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
        Self {
            epoch: number(plan.epoch.0),
            parent: number(plan.parent.0),
            reason: plan.reason.name().to_owned(),
            balance_before: plan.balance_before,
            balance_after: plan.balance_after,
            copies_moved: copies_moved.map(|n| number(n as u64)),
            next,
            layers: i32::try_from(plan.layers.len()).unwrap_or(i32::MAX),
            homes: plan
                .ranks
                .iter()
                .enumerate()
                .map(|(at, rank)| homes(*rank, at, &plan.layers))
                .collect(),
        }
    }
}

fn homes(rank: Rank, at: usize, layers: &[LayerPlacement]) -> RankHomes {
    let mut experts: Vec<String> = Vec::with_capacity(layers.len());
    let mut before = None;
    for layer in layers {
        let text = layer
            .slots
            .get(at)
            .map(|held| ranges(held))
            .unwrap_or_default();
        let same = before.as_ref() == Some(&text);
        experts.push(if same { "=".to_owned() } else { text.clone() });
        before = Some(text);
    }
    RankHomes {
        rank: rank.0,
        experts,
    }
}

/// Ascending experts as numbers and ranges.
fn ranges(held: &[ExpertId]) -> String {
    let mut parts: Vec<(u32, u32)> = Vec::new();
    for ExpertId(expert) in held {
        match parts.last_mut() {
            Some((_, end)) if *end + 1 == *expert => *end = *expert,
            Some((_, end)) if *end == *expert => {}
            _ => parts.push((*expert, *expert)),
        }
    }
    let texts: Vec<String> = parts
        .iter()
        .map(|(from, to)| match from == to {
            true => from.to_string(),
            false => format!("{from}-{to}"),
        })
        .collect();
    texts.join(",")
}

/// The definition to install.
///
/// # Errors
/// See [`SchemaError`].
pub fn definition() -> Result<CustomResourceDefinition, SchemaError> {
    let mut object = schema::generate::<ExpertPlacement>()?;
    crate::rules::constrain_balancing(&mut object)?;
    schema::definition(
        Kind {
            kind: "ExpertPlacement",
            plural: "expertplacements",
            singular: "expertplacement",
            short: "moep",
            columns: columns(),
            scale: None,
        },
        object,
    )
}

fn columns() -> Vec<CustomResourceColumnDefinition> {
    vec![
        schema::column("Epoch", "integer", ".status.epoch", 0),
        schema::column("Why", "string", ".status.reason", 0),
        schema::column("Balance", "number", ".status.balanceAfter", 0),
        schema::column("Moved", "integer", ".status.copiesMoved", 0),
        schema::column("Age", "date", ".metadata.creationTimestamp", 0),
        schema::column("Before", "number", ".status.balanceBefore", 1),
    ]
}

#[cfg(test)]
mod tests {
    use foregate_api::ids::Epoch;
    use foregate_api::placement::Reason;

    use super::*;

    #[test]
    fn homes_are_compact() {
        let ids = |numbers: &[u32]| numbers.iter().map(|n| ExpertId(*n)).collect::<Vec<_>>();
        assert_eq!(ranges(&ids(&[])), "");
        assert_eq!(ranges(&ids(&[3])), "3");
        assert_eq!(ranges(&ids(&[0, 1, 2, 7, 9, 10])), "0-2,7,9-10");
        let ranks = [Rank(0), Rank(2)];
        let layer =
            |a: &[u32], b: &[u32]| LayerPlacement::from_slots(&ranks, vec![ids(a), ids(b)], 4);
        let plan = Placement {
            epoch: Epoch(2),
            parent: Epoch(1),
            reason: Reason::Move,
            ranks: ranks.to_vec(),
            layers: vec![
                layer(&[0, 1], &[2, 3]),
                layer(&[0, 1], &[1, 2]),
                layer(&[0, 3], &[1, 2]),
            ],
            balance_before: 0.5,
            balance_after: 0.9,
        };
        let status = ExpertPlacementStatus::of(&plan, Some(3), None);
        assert_eq!(status.homes[0].experts, ["0-1", "=", "0,3"]);
        assert_eq!(status.homes[1].rank, 2);
        assert_eq!(status.homes[1].experts, ["2-3", "1-2", "="]);
        assert_eq!((status.layers, status.copies_moved), (3, Some(3)));
    }
}
