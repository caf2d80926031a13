use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

fn ids(experts: &[u32]) -> Vec<ExpertId> {
    experts.iter().copied().map(ExpertId).collect()
}

/// Steps until each expert's next use after step `at`.
fn next(steps: &[Vec<ExpertId>], at: usize, experts: usize) -> Vec<Option<u32>> {
    let ahead = |expert: usize| {
        let later = steps[at + 1..].iter();
        let used = |step: &Vec<ExpertId>| step.iter().any(|used| used.index() == expert);
        later
            .zip(1..)
            .find(|(step, _)| used(step))
            .map(|(_, ahead)| ahead)
    };
    (0..experts).map(ahead).collect()
}

fn hits(policy: Policy, steps: &[Vec<ExpertId>], experts: usize, capacity: usize) -> u32 {
    let mut cache = Cache::new(policy, experts, capacity, &[]);
    let step = |(at, used): (usize, &Vec<ExpertId>)| {
        let next = next(steps, at, experts);
        cache.step(used, Outlook::Next(&next)).hits
    };
    steps.iter().enumerate().map(step).sum()
}

/// Most hits that any choice of victims gives, when every miss is stored: tried one by one.
fn most(steps: &[u32], here: &BTreeSet<u32>, capacity: usize) -> u32 {
    let Some((used, rest)) = steps.split_first() else {
        return 0;
    };
    if here.contains(used) {
        return 1 + most(rest, here, capacity);
    }
    let mut with = here.clone();
    with.insert(*used);
    if with.len() <= capacity {
        return most(rest, &with, capacity);
    }
    let without = |victim: &u32| {
        let mut left = with.clone();
        left.remove(victim);
        most(rest, &left, capacity)
    };
    here.iter().map(without).max().unwrap_or(0)
}

#[test]
fn each_policy_names_its_victim() {
    let demand = [0.9, 0.0, 0.5, 0.5];
    let next = [Some(9), Some(2), None, Some(1)];
    for (policy, outlook, victim) in [
        (Policy::LeastRecent, Outlook::Unknown, 0),
        (Policy::Recent { decay: 0.8 }, Outlook::Unknown, 1),
        (
            Policy::Signature {
                share: 1.0,
                decay: 0.5,
            },
            Outlook::Demand(&demand),
            1,
        ),
        (Policy::Ahead { steps: 4 }, Outlook::Next(&next), 0),
        (Policy::Ahead { steps: 20 }, Outlook::Next(&next), 2),
    ] {
        let mut cache = Cache::new(policy, 4, 3, &[]);
        for used in [&[0, 1, 2][..], &[0], &[0], &[1, 2], &[2]] {
            cache.step(&ids(used), Outlook::Unknown);
        }
        let done = cache.step(&ids(&[3]), outlook);
        assert_eq!(
            done.stored,
            [(ExpertId(3), Some(ExpertId(victim)))],
            "{policy:?}"
        );
    }
}

#[test]
fn what_is_pinned_stays_and_takes_no_slot() {
    let mut cache = Cache::new(Policy::LeastRecent, 4, 1, &ids(&[3]));
    for used in [0, 1, 2, 0, 1] {
        cache.step(&ids(&[used]), Outlook::Unknown);
        assert!(cache.has(ExpertId(3)) && cache.has(ExpertId(used)));
    }
    assert_eq!(cache.step(&ids(&[3]), Outlook::Unknown).hits, 1);
}

#[test]
fn a_step_larger_than_the_cache_streams_through() {
    let mut cache = Cache::new(Policy::LeastRecent, 8, 2, &[]);
    let done = cache.step(&ids(&[0, 1, 2, 3]), Outlook::Unknown);
    assert_eq!((done.stored.len(), done.streamed), (2, ids(&[2, 3])));
    assert_eq!(cache.step(&ids(&[9]), Outlook::Unknown), Loaded::default());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn with_the_whole_future_known_nothing_hits_more(
        used in proptest::collection::vec(0u32..5, 1..12), capacity in 1usize..4
    ) {
        let steps: Vec<Vec<ExpertId>> = used.iter().map(|expert| ids(&[*expert])).collect();
        let belady = hits(Policy::Ahead { steps: u32::MAX }, &steps, 5, capacity);
        prop_assert_eq!(belady, most(&used, &BTreeSet::new(), capacity));
    }

    #[test]
    fn the_cache_holds_its_capacity_and_every_member_of_a_step_that_fits(
        steps in proptest::collection::vec(proptest::collection::btree_set(0u32..9, 1..4), 1..40),
        capacity in 3usize..6,
        policy in prop_oneof![
            Just(Policy::LeastRecent),
            Just(Policy::Recent { decay: 0.8 }),
            Just(Policy::Signature { share: 0.5, decay: 0.8 }),
            Just(Policy::Ahead { steps: 3 }),
        ]
    ) {
        let mut cache = Cache::new(policy, 9, capacity, &[]);
        for step in steps {
            let used: Vec<u32> = step.into_iter().collect();
            cache.step(&ids(&used), Outlook::Unknown);
            prop_assert!(used.iter().all(|expert| cache.has(ExpertId(*expert))));
            prop_assert!((0..9).filter(|expert| cache.has(ExpertId(*expert))).count() <= capacity);
        }
    }
}
