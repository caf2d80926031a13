//! The move that comes next, for the status of a placement: from the record of how it was decided.

use std::time::Duration;

use foregate_api::ids::Epoch;
use foregate_crd::placement::NextMove;
use foregate_explain::{Coming, Record, coming};
use foregate_store::past::Item;
use foregate_store::{Archive, StoreError};

/// Looks for a record that is on its way, and the pause between two.
const LOOKS: u32 = 10;
const PAUSE: Duration = Duration::from_millis(200);

/// What follows on the decision that led to `epoch`. `None` if nothing does soon, or if it cannot be told: that is no
/// reason to hold a status back, and is logged.
pub(crate) async fn next(archive: &Archive, epoch: Epoch) -> Option<NextMove> {
    let found = match record(archive, epoch).await {
        Ok(found) => found?,
        Err(error) => {
            tracing::warn!(%epoch, %error, "no record to tell the next move from");
            return None;
        }
    };
    let (record, parent) = found;
    // Plans of a large model take a while.
    let told = tokio::task::spawn_blocking(move || coming(&record, parent.as_ref())).await;
    match told {
        Ok(Ok(coming)) => coming.as_ref().map(of),
        Ok(Err(error)) => {
            tracing::warn!(%epoch, %error, "the next move cannot be told");
            None
        }
        Err(error) => {
            tracing::error!(%epoch, %error, "the next move cannot be told");
            None
        }
    }
}

type Found = (Record, Option<foregate_api::placement::Placement>);

/// The record of a decision and the placement that it was made on. It is written beside the placement, not before it.
async fn record(archive: &Archive, epoch: Epoch) -> Result<Option<Found>, StoreError> {
    for _ in 0..LOOKS {
        let record: Option<Record> = archive.get(&Item::Decision(epoch)).await?;
        let Some(record) = record else {
            tokio::time::sleep(PAUSE).await;
            continue;
        };
        let parent = match record.parent {
            Epoch(0) => None,
            parent => archive.placement(parent).await?,
        };
        return Ok(Some((record, parent)));
    }
    tracing::info!(%epoch, "no record to tell the next move from");
    Ok(None)
}

fn of(coming: &Coming) -> NextMove {
    NextMove {
        windows: i32::try_from(coming.windows).unwrap_or(i32::MAX),
        verdict: coming.verdict.name().to_owned(),
        copies: i64::try_from(coming.copies).unwrap_or(i64::MAX),
        layers: coming
            .layers
            .iter()
            .map(|layer| i32::try_from(layer.0).unwrap_or(i32::MAX))
            .collect(),
        balance_before: coming.balance_before,
        balance_after: coming.balance_after,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use foregate_api::ids::Rank;
    use foregate_explain::record::{Measured, Trigger};
    use foregate_planner::{History, Problem, RankSlots, Settings, plan};
    use foregate_store::memory::MemoryStore;

    use super::*;

    /// One move is allowed where two are needed, so the record of the first tells of the second.
    #[tokio::test]
    async fn the_record_of_a_decision_tells_what_follows() {
        let ranks = (0..3).map(|rank| RankSlots {
            rank: Rank(rank),
            slots: 4,
            domain: format!("host-{rank}"),
        });
        let mut problem = Problem::uniform(ranks.collect(), 2, 8);
        let settings = Settings {
            max_moves_per_layer: 1,
            ..Settings::default()
        };
        let even = plan(&problem, None, &settings, &mut History::default()).unwrap();
        let first = even.placement().unwrap();
        let skewed = vec![400.0, 380.0, 20.0, 20.0, 20.0, 20.0, 20.0, 20.0];
        problem.demand = vec![skewed.clone(), skewed.into_iter().rev().collect()];
        problem.evidence = 1e6;
        problem.above = first.epoch;
        let decision = plan(&problem, Some(first), &settings, &mut History::default()).unwrap();
        let (report, second) = (decision.report(), decision.placement().unwrap());
        let record = Record {
            at_ms: 1,
            trigger: Trigger::Window { rows: 900 },
            verdict: report.verdict,
            reason: report.reason,
            parent: report.parent,
            epoch: report.epoch,
            problem,
            settings,
            history: History::default(),
            window_ms: 2000,
            expert_bytes: 1000,
            dense_bytes: 500,
            predicted: Record::predict(report, 1000),
            measured: Measured::default(),
        };
        let archive = Archive::new(Arc::new(MemoryStore::new()), "tiny");
        archive.keep_placement(first).await.unwrap();
        archive
            .keep(&Item::Decision(second.epoch), &record)
            .await
            .unwrap();
        let next = next(&archive, second.epoch).await.expect("a second move");
        assert_eq!(next.verdict, "move");
        assert!(next.windows > 0 && next.copies > 0, "{next:?}");
        assert!(next.balance_after > next.balance_before, "{next:?}");
        assert!(!next.layers.is_empty() && next.layers.iter().all(|layer| *layer < 2));
    }

    #[tokio::test(start_paused = true)]
    async fn without_a_record_nothing_is_told() {
        let archive = Archive::new(Arc::new(MemoryStore::new()), "tiny");
        assert_eq!(next(&archive, Epoch(7)).await, None);
    }
}
