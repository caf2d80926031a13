use foregate_checkpoint::ExpertHash;
use foregate_checkpoint::tiny::Tiny;
use foregate_kernels::Cpu;
use proptest::prelude::*;

use foregate_api::model::Family;
use foregate_api::weights::WeightFormat;

use super::*;

fn tiny(format: WeightFormat) -> (tempfile::TempDir, Checkpoint) {
    let dir = tempfile::tempdir().unwrap();
    let mut tiny = Tiny::new(Family::Qwen3Moe);
    tiny.format = format;
    tiny.write(dir.path()).unwrap();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    (dir, checkpoint)
}

#[test]
fn canonical_bytes_come_back_from_the_packed_form() {
    for format in [WeightFormat::Float32, WeightFormat::Bfloat16] {
        let (_dir, checkpoint) = tiny(format);
        let parts = checkpoint.expert(LayerId(2), ExpertId(7)).unwrap();
        let packed = ExpertWeights::from_parts(&parts).unwrap();
        let canonical = parts.to_canonical();
        assert_eq!(packed.to_canonical().unwrap(), canonical);
        assert_eq!(packed.hash(), ExpertHash::of(&canonical));
        assert!(packed.bytes() >= canonical.len());
        let again = ExpertWeights::from_canonical(checkpoint.spec(), &canonical).unwrap();
        assert_eq!(again.to_canonical().unwrap(), canonical);
        assert_eq!(again.hash(), packed.hash());
    }
}

#[test]
fn canonical_bytes_of_a_wrong_length_are_refused() {
    let (_dir, checkpoint) = tiny(WeightFormat::Bfloat16);
    let right = checkpoint.spec().expert_bytes();
    for length in [
        0,
        1,
        right / 3,
        right / 2,
        right - 2,
        right - 1,
        right + 1,
        right * 2,
    ] {
        let bytes = vec![0; length];
        let packed = ExpertWeights::from_canonical(checkpoint.spec(), &bytes);
        assert!(packed.is_err(), "{length}");
    }
}

/// Rows computed and summed one by one, as the definition says.
#[test]
fn a_batch_gives_the_bits_of_its_rows_alone_and_leaves_dead_rows_out() {
    let (_dir, checkpoint) = tiny(WeightFormat::Float32);
    let mut experts = LocalExperts::load(&checkpoint, Arc::new(Cpu::new(2))).unwrap();
    let hidden = checkpoint.spec().hidden;
    let input: Vec<f32> = (0..4 * hidden)
        .map(|i| ((i * 37 % 101) as f32 - 50.0) / 40.0)
        .collect();
    let chosen = [0, 3, 3, 7, 0, 1, 3, 5];
    let weights = [0.25, 0.75, 0.5, 0.5, 0.125, 0.875, 1.0, 0.0];
    let run = |experts: &mut LocalExperts, rows: std::ops::Range<usize>, dead: &[bool]| {
        let mut out = vec![f32::NAN; rows.len() * hidden];
        let batch: ExpertBatch<'_> = ExpertBatch {
            layer: LayerId(1),
            input: &input[rows.start * hidden..rows.end * hidden],
            hidden,
            experts: &chosen[rows.start * 2..rows.end * 2],
            weights: &weights[rows.start * 2..rows.end * 2],
            top_k: 2,
            dead,
        };
        assert!(experts.run(&batch, &mut out).unwrap().is_empty());
        out
    };
    let together = run(&mut experts, 0..4, &[false; 4]);
    let with_dead = run(&mut experts, 0..4, &[false, true, false, false]);
    for row in 0..4 {
        let at = row * hidden..(row + 1) * hidden;
        let alone = run(&mut experts, row..row + 1, &[false]);
        assert_eq!(alone, together[at.clone()]);
        if row != 1 {
            assert_eq!(alone, with_dead[at]);
        }
    }
    assert!(together.iter().all(|value| value.is_finite()));
}

#[test]
fn a_layer_that_does_not_exist_is_an_error() {
    let (_dir, checkpoint) = tiny(WeightFormat::Float32);
    let mut experts = LocalExperts::load(&checkpoint, Arc::new(Cpu::new(1))).unwrap();
    let batch: ExpertBatch<'_> = ExpertBatch {
        layer: LayerId(3),
        input: &[],
        hidden: 32,
        experts: &[],
        weights: &[],
        top_k: 2,
        dead: &[],
    };
    let error = experts.run(&batch, &mut []).unwrap_err();
    assert!(error.to_string().contains("layer 3"), "{error}");
}

proptest! {
    #[test]
    fn groups_are_a_permutation_of_the_living_pairs(
        experts in prop::collection::vec(0_u32..12, 0..40),
        dead in prop::collection::vec(any::<bool>(), 20),
    ) {
        let top_k = 2;
        let pairs = &experts[..experts.len() / top_k * top_k];
        let batch: ExpertBatch<'_> = ExpertBatch {
            layer: LayerId(0),
            input: &[],
            hidden: 0,
            experts: pairs,
            weights: &[],
            top_k,
            dead: &dead[..pairs.len() / top_k],
        };
        let mut groups = ExpertGroups::default();
        // Ten experts exist: ids 10 and 11 have no place.
        groups.sort(&batch, 10);
        let mut seen = vec![false; groups.places()];
        for (pair, place) in groups.place.iter().enumerate() {
            let row = pair / top_k;
            if dead[row] || pairs[pair] >= 10 {
                prop_assert_eq!(*place, ExpertGroups::NOWHERE);
                continue;
            }
            let place = *place as usize;
            prop_assert!(!std::mem::replace(&mut seen[place], true));
            prop_assert_eq!(groups.rows[place] as usize, row);
            let (expert, _) = groups.groups.iter().find(|(_, range)| range.contains(&place)).unwrap();
            prop_assert_eq!(expert.0, pairs[pair]);
        }
        prop_assert!(seen.iter().all(|seen| *seen));
        prop_assert!(groups.groups.is_sorted_by(|a, b| a.0 < b.0 && a.1.end == b.1.start));
    }
}
