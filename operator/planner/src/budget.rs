//! Which layers' moves are made: those that pay, and of these as many as the bytes of a window carry.

use crate::settings::{Economy, Settings};
use crate::trigger::Because;

/// What a layer's move would bring and take.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Offer {
    /// Layer index.
    pub(crate) layer: usize,
    /// Gain in expected balance; infinite for a move that closes a gap in cover.
    pub(crate) gain: f64,
    /// Copies to load.
    pub(crate) copies: usize,
    /// Seconds it saves over the horizon and costs; both 0 if that is not weighed.
    pub(crate) seconds: (f64, f64),
}

/// Seconds that a layer's move saves over the horizon, and what it costs.
///
/// With T the time of a layer's experts at balance 1, a step's time changes by T·(1/q0 − 1/q1); the copies of the rank
/// that loads the most take bytes / link seconds, during which decoding is slower by a part.
pub(crate) fn seconds(
    economy: &Economy,
    (layers, expert_bytes): (usize, u64),
    (q0, q1): (f64, f64),
    most_to_one: usize,
) -> (f64, f64) {
    let per_layer = economy.busy * economy.horizon_s / layers.max(1) as f64;
    let bytes = most_to_one as f64 * expert_bytes as f64;
    (
        per_layer * (1.0 / q0 - 1.0 / q1),
        bytes / economy.link_bytes_per_s * economy.slowdown,
    )
}

/// The layers that do not move after all, and why, ascending by layer.
///
/// Moves are made by gain per byte, ties to the lower layer, until one does not fit; none after it is made, so that a
/// larger budget only adds moves.
pub(crate) fn refused(
    mut offers: Vec<Offer>,
    expert_bytes: u64,
    settings: &Settings,
) -> Vec<(usize, Because)> {
    let pays = |offer: &Offer| {
        settings.economy.is_none()
            || offer.gain.is_infinite()
            || offer.seconds.0 > offer.seconds.1
    };
    let mut refused: Vec<(usize, Because)> = offers
        .iter()
        .filter(|offer| !pays(offer))
        .map(|offer| (offer.layer, Because::NotWorth))
        .collect();
    offers.retain(pays);
    let per_copy = |offer: &Offer| offer.gain / offer.copies.max(1) as f64;
    offers.sort_by(|a, b| {
        per_copy(b)
            .total_cmp(&per_copy(a))
            .then(a.layer.cmp(&b.layer))
    });
    let mut left = settings.max_bytes.unwrap_or(u64::MAX);
    for offer in offers {
        let bytes = expert_bytes.saturating_mul(offer.copies as u64);
        match left.checked_sub(bytes) {
            Some(rest) => left = rest,
            None => {
                refused.push((offer.layer, Because::Budget));
                left = 0;
            }
        }
    }
    refused.sort_by_key(|(layer, _)| *layer);
    refused
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offer(layer: usize, gain: f64, copies: usize) -> Offer {
        Offer {
            layer,
            gain,
            copies,
            seconds: (gain, 0.01),
        }
    }

    #[test]
    fn bytes_go_where_they_gain_most_and_more_of_them_only_add() {
        let offers = vec![
            offer(0, 0.04, 4),
            offer(1, 0.02, 1),
            offer(2, f64::INFINITY, 4),
            offer(3, 0.03, 2),
        ];
        let layers = |max_bytes| {
            let settings = Settings {
                max_bytes,
                ..Settings::default()
            };
            let refused = refused(offers.clone(), 10, &settings);
            assert!(refused.iter().all(|(_, why)| *why == Because::Budget));
            refused.iter().map(|(layer, _)| *layer).collect::<Vec<_>>()
        };
        assert!(layers(None).is_empty());
        assert!(layers(Some(110)).is_empty());
        assert_eq!(layers(Some(109)), [0]);
        assert_eq!(layers(Some(50)), [0, 3]);
        assert_eq!(layers(Some(40)), [0, 1, 3]);
        assert_eq!(layers(Some(39)), [0, 1, 2, 3]);
    }

    #[test]
    fn a_move_pays_if_it_saves_more_than_it_costs() {
        let economy = Economy {
            busy: 0.5,
            horizon_s: 100.0,
            link_bytes_per_s: 1e9,
            slowdown: 0.1,
        };
        let (saves, costs) = seconds(&economy, (10, 50_000_000), (0.8, 1.0), 4);
        assert!((saves - 1.25).abs() < 1e-9 && (costs - 0.02).abs() < 1e-9);
        let settings = Settings {
            economy: Some(economy),
            ..Settings::default()
        };
        let offers = vec![
            offer(0, 0.02, 1),
            offer(1, 0.005, 1),
            offer(2, f64::INFINITY, 1),
        ];
        assert_eq!(refused(offers, 1, &settings), [(1, Because::NotWorth)]);
    }
}
