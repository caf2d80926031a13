//! Values as bytes: JSON with a format number, `{"format":2,"value":…}`.
//!
//! A reader meets values of other versions and of broken writers; both are [`StoreError::Corrupt`]. Placements
//! have a form of their own: slots, and shares only of experts with several copies. 61 layers of 640 slots stay
//! below 600 KB of JSON, less than half of etcd's request limit of 1.5 MiB.

use bytes::Bytes;
use foregate_api::forecast::Forecast;
use foregate_api::ids::{Epoch, ExpertId, Rank};
use foregate_api::member::{Ack, Member};
use foregate_api::placement::{LayerPlacement, Placement, Reason};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::kv::StoreError;

/// The format that this version writes. It reads format 1 too, which told one format for all weights of a member's
/// model where format 2 tells that of each part; other values are the same in both.
pub const FORMAT: u32 = 2;
/// The oldest format that this version reads.
const OLDEST: u32 = 1;

/// Highest epoch that is believed: numbers only grow, so one wrong value would leave none above it.
const MAX_EPOCH: Epoch = Epoch(1 << 53);
/// Most (MoE layer, expert) pairs of a model that is believed: a load window of more has no room in etcd's request.
const MAX_PAIRS: usize = 1 << 20;
/// Longest excerpt of a bad value in an error.
const EXCERPT: usize = 60;

#[derive(Serialize)]
struct Outgoing<'a, T> {
    format: u32,
    value: &'a T,
}

#[derive(Deserialize)]
struct FormatOnly {
    format: u32,
}

#[derive(Deserialize)]
struct Incoming<T> {
    value: T,
}

/// A value as bytes.
///
/// # Errors
/// If the value has no JSON form.
pub fn encode<T: Serialize>(value: &T) -> Result<Bytes, StoreError> {
    let outgoing = Outgoing {
        format: FORMAT,
        value,
    };
    serde_json::to_vec(&outgoing)
        .map(Bytes::from)
        .map_err(|e| StoreError::Refused(format!("the value has no JSON form: {e}")))
}

/// A value from the bytes under `key`.
///
/// # Errors
/// [`StoreError::Corrupt`] if the format is unknown or the value is not what it should be.
pub fn decode<T: DeserializeOwned>(key: &str, bytes: &[u8]) -> Result<T, StoreError> {
    let format = serde_json::from_slice::<FormatOnly>(bytes)
        .map_err(|e| corrupt(key, format!("{e}, found {}", excerpt(bytes))))?;
    if !is_read(format.format) {
        return Err(corrupt(
            key,
            format!(
                "format {}, this version reads formats {OLDEST} to {FORMAT}",
                format.format
            ),
        ));
    }
    serde_json::from_slice::<Incoming<T>>(bytes)
        .map(|incoming| incoming.value)
        .map_err(|e| corrupt(key, e.to_string()))
}

/// Whether a newer or older version wrote these bytes: they mean something to somebody, and are not to be replaced.
pub(crate) fn is_of_another_format(bytes: &[u8]) -> bool {
    serde_json::from_slice::<FormatOnly>(bytes).is_ok_and(|found| !is_read(found.format))
}

fn is_read(format: u32) -> bool {
    (OLDEST..=FORMAT).contains(&format)
}

/// A worker's registration from the bytes under `key`, checked so far that no reader makes room for a model that
/// does not exist.
///
/// # Errors
/// [`StoreError::Corrupt`].
pub fn decode_member(key: &str, bytes: &[u8]) -> Result<Member, StoreError> {
    let member: Member = decode(key, bytes)?;
    let (layers, experts) = (member.model.moe_layers(), member.model.experts);
    if layers.saturating_mul(experts) > MAX_PAIRS {
        let what = format!("its model has {layers} MoE layers of {experts} experts");
        return Err(corrupt(key, what));
    }
    Ok(member)
}

/// A worker's progress from the bytes under `key`.
///
/// # Errors
/// [`StoreError::Corrupt`].
pub fn decode_ack(key: &str, bytes: &[u8]) -> Result<Ack, StoreError> {
    let ack: Ack = decode(key, bytes)?;
    check_epoch(key, ack.prepared.max(ack.serving).max(ack.drained))?;
    Ok(ack)
}

/// A gateway's forecast from the bytes under `key`.
///
/// # Errors
/// [`StoreError::Corrupt`].
pub fn decode_forecast(key: &str, bytes: &[u8]) -> Result<Forecast, StoreError> {
    let forecast: Forecast = decode(key, bytes)?;
    if !(0.0..=1.0).contains(&forecast.confidence) {
        let what = format!("a confidence of {}", forecast.confidence);
        return Err(corrupt(key, what));
    }
    Ok(forecast)
}

fn check_epoch(key: &str, epoch: Epoch) -> Result<(), StoreError> {
    if epoch > MAX_EPOCH {
        return Err(corrupt(key, format!("epoch {epoch} was never reached")));
    }
    Ok(())
}

fn corrupt(key: &str, what: String) -> StoreError {
    StoreError::Corrupt {
        key: key.to_owned(),
        what,
    }
}

fn excerpt(bytes: &[u8]) -> String {
    let head = bytes.get(..EXCERPT.min(bytes.len())).unwrap_or_default();
    format!("{:?}", String::from_utf8_lossy(head))
}

/// A placement as it is written.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct StoredPlacement {
    epoch: Epoch,
    parent: Epoch,
    reason: Reason,
    ranks: Vec<Rank>,
    experts: u32,
    layers: Vec<StoredLayer>,
    balance_before: f64,
    balance_after: f64,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct StoredLayer {
    /// `slots[i][s]`: expert in slot `s` of the i-th rank.
    slots: Vec<Vec<ExpertId>>,
    /// Shares of the experts with several copies: (expert, shares of its copies by ascending rank).
    shares: Vec<(ExpertId, Vec<f32>)>,
}

/// A placement as bytes.
///
/// # Errors
/// If it is not in canonical form, so that no reader would get back what was written.
pub fn encode_placement(plan: &Placement) -> Result<Bytes, StoreError> {
    let experts = plan.layers.first().map_or(0, |layer| layer.copies.len());
    let stored = StoredPlacement {
        epoch: plan.epoch,
        parent: plan.parent,
        reason: plan.reason,
        ranks: plan.ranks.clone(),
        experts: u32::try_from(experts)
            .map_err(|_| StoreError::Refused(format!("{experts} experts in a layer")))?,
        layers: plan.layers.iter().map(store_layer).collect(),
        balance_before: plan.balance_before,
        balance_after: plan.balance_after,
    };
    let bytes = encode(&stored)?;
    match decode_placement("placement", &bytes) {
        Ok(back) if back == *plan => Ok(bytes),
        Ok(_) => Err(StoreError::Refused(format!(
            "placement {} is not in canonical form (slots and copies ascending and of one mind)",
            plan.epoch
        ))),
        Err(e) => Err(StoreError::Refused(e.to_string())),
    }
}

fn store_layer(layer: &LayerPlacement) -> StoredLayer {
    let several = layer.copies.iter().enumerate().filter(|(_, c)| c.len() > 1);
    StoredLayer {
        slots: layer.slots.clone(),
        shares: several
            .filter_map(|(e, copies)| {
                let expert = ExpertId(u32::try_from(e).ok()?);
                Some((expert, copies.iter().map(|copy| copy.share).collect()))
            })
            .collect(),
    }
}

/// A placement from the bytes under `key`, checked so far that no reader can index out of it.
///
/// # Errors
/// [`StoreError::Corrupt`].
pub fn decode_placement(key: &str, bytes: &[u8]) -> Result<Placement, StoreError> {
    let stored: StoredPlacement = decode(key, bytes)?;
    check_epoch(key, stored.epoch.max(stored.parent))?;
    if stored.ranks.windows(2).any(|pair| pair[0] >= pair[1]) {
        return Err(corrupt(key, "ranks are not ascending".into()));
    }
    if !stored.balance_before.is_finite() || !stored.balance_after.is_finite() {
        return Err(corrupt(key, "a balance is not finite".into()));
    }
    let experts = stored.experts as usize;
    let mut layers = Vec::with_capacity(stored.layers.len());
    for (l, layer) in stored.layers.into_iter().enumerate() {
        let layer = restore_layer(layer, &stored.ranks, experts)
            .map_err(|what| corrupt(key, format!("layer {l}: {what}")))?;
        layers.push(layer);
    }
    Ok(Placement {
        epoch: stored.epoch,
        parent: stored.parent,
        reason: stored.reason,
        ranks: stored.ranks,
        layers,
        balance_before: stored.balance_before,
        balance_after: stored.balance_after,
    })
}

fn restore_layer(
    stored: StoredLayer,
    ranks: &[Rank],
    experts: usize,
) -> Result<LayerPlacement, String> {
    if stored.slots.len() != ranks.len() {
        return Err(format!(
            "slots of {} ranks, not {}",
            stored.slots.len(),
            ranks.len()
        ));
    }
    // Bounds the work below by the size of the value, whatever `experts` claims.
    let slots: usize = stored.slots.iter().map(Vec::len).sum();
    if experts > slots {
        return Err(format!("{experts} experts in {slots} slots"));
    }
    if let Some(odd) = stored.slots.iter().flatten().find(|e| e.index() >= experts) {
        return Err(format!("expert {odd} of {experts}"));
    }
    let mut layer = LayerPlacement::from_slots(ranks, stored.slots, experts);
    for (expert, shares) in stored.shares {
        let copies = layer
            .copies
            .get_mut(expert.index())
            .filter(|copies| copies.len() == shares.len())
            .ok_or_else(|| format!("shares of expert {expert} do not match its copies"))?;
        for (copy, share) in copies.iter_mut().zip(shares) {
            if !(0.0..=1.0).contains(&share) {
                return Err(format!("a share of expert {expert} is {share}"));
            }
            copy.share = share;
        }
    }
    Ok(layer)
}

#[cfg(test)]
mod tests {
    use foregate_api::weights::{WeightFormat, WeightFormats};

    use super::*;

    fn placement() -> Placement {
        let ranks = vec![Rank(0), Rank(2)];
        let slots = vec![
            vec![ExpertId(0), ExpertId(1)],
            vec![ExpertId(1), ExpertId(2)],
        ];
        let mut layer = LayerPlacement::from_slots(&ranks, slots, 3);
        layer.copies[1][0].share = 0.1;
        layer.copies[1][1].share = 0.9;
        Placement {
            epoch: Epoch(4),
            parent: Epoch(3),
            reason: Reason::Move,
            ranks,
            layers: vec![layer.clone(), layer],
            balance_before: 0.5,
            balance_after: 0.75,
        }
    }

    #[test]
    fn placements_come_back_as_written() {
        let plan = placement();
        let bytes = encode_placement(&plan).unwrap();
        assert_eq!(decode_placement("k", &bytes).unwrap(), plan);
    }

    #[test]
    fn golden_bytes_of_format_two() {
        let mut plan = placement();
        plan.layers.truncate(1);
        let golden = r#"{"format":2,"value":{"epoch":4,"parent":3,"reason":"move","ranks":[0,2],"experts":3,"layers":[{"slots":[[0,1],[1,2]],"shares":[[1,[0.1,0.9]]]}],"balance_before":0.5,"balance_after":0.75}}"#;
        assert_eq!(encode_placement(&plan).unwrap(), golden.as_bytes());
        let ack = Ack {
            prepared: Epoch(2),
            serving: Epoch(1),
            drained: Epoch(0),
        };
        let golden = r#"{"format":2,"value":{"prepared":2,"serving":1,"drained":0}}"#;
        assert_eq!(encode(&ack).unwrap(), golden.as_bytes());
    }

    #[test]
    fn golden_bytes_of_a_forecast() {
        let mut forecast = Forecast::of(2000, 40.0, 0.5, &[vec![1.0, 3.0]]);
        forecast.sequence = 7;
        let golden = br#"{"format":2,"value":{"sequence":7,"horizon_ms":2000,"rows":40,"confidence":0.5,"shares":[[16384,49151]]}}"#;
        assert_eq!(encode(&forecast).unwrap(), golden.as_slice());
        assert_eq!(decode_forecast("/k", golden).unwrap(), forecast);
        let text = String::from_utf8(golden.to_vec()).unwrap();
        for (from, to, says) in [
            ("0.5", "1.5", "confidence"),
            ("49151", "70000", "u16"),
            ("\"rows\":40", "\"rows\":-1", "u64"),
        ] {
            let bad = text.replace(from, to);
            assert_ne!(bad, text);
            let error = decode_forecast("/k", bad.as_bytes())
                .unwrap_err()
                .to_string();
            assert!(error.contains(says), "{error}");
        }
    }

    /// One format for all weights, as it was written before each part had its own.
    #[test]
    fn golden_bytes_of_format_one_are_read() {
        let golden = br#"{"format":1,"value":{"rank":0,"incarnation":7,"rpc":"127.0.0.1:1","exchange":"127.0.0.1:2","domain":"","slots":4,"phase":"ready","model":{"family":"mixtral","format":"bfloat16","vocab":64,"hidden":32,"layers":1,"heads":4,"kv_heads":2,"head_dim":8,"max_positions":256,"rope_theta":10000.0,"norm_eps":1e-6,"qkv_bias":false,"clip_qkv":null,"tied_embeddings":false,"dense_inner":48,"moe_blocks":[true],"experts":8,"top_k":2,"expert_inner":24,"norm_top_k":true,"shared_inner":null,"eos":[2],"bos":1},"cpu_path":"avx512","kv_pages":8,"page_tokens":16}}"#;
        let member = decode_member("/k", golden).unwrap();
        let all = WeightFormats::all(WeightFormat::Bfloat16);
        assert_eq!(member.model.formats, all);
        assert!(!is_of_another_format(golden));
        let text = String::from_utf8(golden.to_vec()).unwrap();
        let formats = r#""formats":{"embedding":"bfloat16","attention":"int8","router":"bfloat16","expert":{"int4":{"group":64}},"dense":{"fp8":{"rows":128,"columns":128}},"output":"mxfp4"}"#;
        let two = text
            .replace("\"format\":1", "\"format\":2")
            .replace("\"format\":\"bfloat16\"", formats)
            .replace("1e-6", "0.000001");
        let member = decode_member("/k", two.as_bytes()).unwrap();
        assert_eq!(encode(&member).unwrap(), two.as_bytes());
        let ack = br#"{"format":1,"value":{"prepared":2,"serving":1,"drained":0}}"#;
        assert_eq!(decode_ack("/k", ack).unwrap().prepared, Epoch(2));
    }

    #[test]
    fn what_no_reader_would_get_back_is_not_written() {
        let mut plan = placement();
        plan.layers[0].copies[0].clear();
        assert!(matches!(
            encode_placement(&plan),
            Err(StoreError::Refused(_))
        ));
        let mut plan = placement();
        plan.balance_after = f64::NAN;
        assert!(matches!(
            encode_placement(&plan),
            Err(StoreError::Refused(_))
        ));
    }

    #[test]
    fn other_formats_and_garbage_are_named() {
        let text = |bytes: &[u8]| decode::<Ack>("/k", bytes).unwrap_err().to_string();
        let three = text(br#"{"format":3,"value":{}}"#);
        assert!(
            three.contains("/k") && three.contains("format 3"),
            "{three}"
        );
        assert!(text(b"\xff\x00").contains("/k"));
        assert!(text(br#"{"format":2,"value":{"prepared":1}}"#).contains("serving"));
        assert!(text(b"").contains("/k"));
    }

    #[test]
    fn numbers_that_nobody_reached_are_refused() {
        let last = |field: &str| {
            let text = r#"{"format":2,"value":{"prepared":1,"serving":1,"drained":0}}"#;
            let text = text.replace(
                &format!("\"{field}\":"),
                &format!("\"{field}\":1844674407370955161"),
            );
            decode_ack("/k", text.as_bytes()).unwrap_err().to_string()
        };
        for field in ["prepared", "serving", "drained"] {
            assert!(last(field).contains("never reached"), "{field}");
        }
        assert!(
            decode_ack(
                "/k",
                br#"{"format":2,"value":{"prepared":9,"serving":8,"drained":7}}"#
            )
            .is_ok()
        );
    }

    #[test]
    fn placements_that_would_be_indexed_out_of_are_refused() {
        let bytes = encode_placement(&placement()).unwrap();
        let good = String::from_utf8(bytes.to_vec()).unwrap();
        for (from, to, says) in [
            ("\"ranks\":[0,2]", "\"ranks\":[2,0]", "ascending"),
            ("\"ranks\":[0,2]", "\"ranks\":[0,1,2]", "slots of 2 ranks"),
            ("\"experts\":3", "\"experts\":2", "expert 2 of 2"),
            ("\"experts\":3", "\"experts\":4000000000", "in 4 slots"),
            (
                "\"epoch\":4",
                "\"epoch\":18446744073709551615",
                "never reached",
            ),
            ("[1,[0.1,0.9]]", "[1,[0.1]]", "do not match"),
            ("[1,[0.1,0.9]]", "[9,[0.1,0.9]]", "do not match"),
            ("[1,[0.1,0.9]]", "[1,[-1.0,2.0]]", "a share of expert 1"),
        ] {
            let bad = good.replace(from, to);
            assert_ne!(bad, good);
            let error = decode_placement("k", bad.as_bytes())
                .unwrap_err()
                .to_string();
            assert!(error.contains(says), "{error}");
        }
    }
}
