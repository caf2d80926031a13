use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::kv_cache::Page;
use crate::sequence::tests::request;
use crate::sequence::{Finish, Request};

fn scheduler(seqs: usize, tokens: usize, pages: usize) -> Scheduler {
    let limits = Limits {
        max_num_seqs: seqs,
        max_batched_tokens: tokens,
        max_logit_rows: 0,
        overtake: Overtake::default(),
    };
    Scheduler::new(limits, PagePool::new(pages, 4))
}

/// One in which those who wait may be overtaken for so many microseconds, of a model with one layer of four experts.
fn overtaking(seqs: usize, tokens: usize, pages: usize, patience: u64) -> Scheduler {
    let mut s = scheduler(seqs, tokens, pages);
    s.limits.overtake = Overtake { patience, top_k: 1 };
    s
}

/// A request that is expected to use one expert only; of none nothing is known.
fn hinted(tokens: Vec<u32>, max_tokens: usize, expert: Option<usize>) -> Request {
    let mut request = request(tokens, max_tokens);
    request.stop_tokens.clear();
    request.hint = expert.map(|expert| Hint {
        layers: vec![0],
        roots: (0..4)
            .map(|at| if at == expert { 255 } else { 0 })
            .collect(),
    });
    request
}

fn submit_at(s: &mut Scheduler, id: u64, request: Request, now: u64) {
    let mut sequence = Sequence::new(SequenceId(id), request, 4);
    sequence.arrived = now;
    s.submit(sequence).unwrap();
}

fn submit(s: &mut Scheduler, id: u64, request: Request) {
    s.submit(Sequence::new(SequenceId(id), request, 0)).unwrap();
}

/// Plays the engine: commits every chunk and answers with a token that depends on the position.
fn play(s: &mut Scheduler, plan: &Plan) -> Vec<(SequenceId, Finish)> {
    let mut ended = Vec::new();
    for chunk in &plan.chunks {
        s.commit(chunk);
        let sequence = s.get_mut(chunk.id).unwrap();
        if chunk.sample {
            sequence.push(sequence.tokens.len() as u32);
        } else if sequence.missing() == 0 {
            sequence.finish(Finish::Length);
        }
        if let State::Finished(why) = sequence.state() {
            s.remove(chunk.id);
            ended.push((chunk.id, why));
        }
    }
    ended
}

fn plan_of(s: &mut Scheduler, now: u64) -> Plan {
    let mut plan = Plan::default();
    s.schedule(now, &mut plan);
    plan
}

fn spans(plan: &Plan) -> Vec<(u64, usize, usize)> {
    plan.chunks
        .iter()
        .map(|c| (c.id.0, c.start, c.len))
        .collect()
}

#[test]
fn decode_goes_first_and_prefill_takes_the_rest() {
    let mut s = scheduler(4, 6, 32);
    submit(&mut s, 1, request(vec![1, 2], 9));
    let plan = plan_of(&mut s, 0);
    play(&mut s, &plan);
    submit(&mut s, 2, request((0..20).collect(), 9));
    let plan = plan_of(&mut s, 0);
    assert_eq!(spans(&plan), [(1, 2, 1), (2, 0, 5)]);
    play(&mut s, &plan);
    assert_eq!(spans(&plan_of(&mut s, 0)), [(1, 3, 1), (2, 5, 5)]);
}

#[test]
fn the_youngest_gives_way_and_keeps_its_place_in_the_queue() {
    let mut s = scheduler(4, 64, 4);
    submit(&mut s, 1, request(vec![1; 4], 12));
    submit(&mut s, 2, request(vec![2; 4], 12));
    submit(&mut s, 3, request(vec![3; 4], 12));
    let mut order = Vec::new();
    for _ in 0..100 {
        let plan = plan_of(&mut s, 0);
        assert!(!plan.preempted.contains(&SequenceId(1)));
        order.extend(play(&mut s, &plan).into_iter().map(|(id, _)| id.0));
        if s.is_empty() {
            break;
        }
    }
    assert_eq!(order, [1, 2, 3]);
    assert!(s.preemptions() > 0);
    assert_eq!(s.pool().used(), 0);
}

#[test]
fn those_whose_experts_are_read_anyway_go_first_for_a_while() {
    let mut s = overtaking(2, 64, 64, 1000);
    for (id, expert) in [
        (1, Some(0)),
        (2, Some(3)),
        (3, None),
        (4, Some(0)),
        (5, Some(3)),
    ] {
        submit_at(&mut s, id, hinted(vec![1; 4], 30, expert), 0);
    }
    let first = plan_of(&mut s, 10);
    assert_eq!(first.admitted, [SequenceId(1), SequenceId(4)]);
    play(&mut s, &first);
    s.remove(SequenceId(4));
    let next = plan_of(&mut s, 20);
    assert_eq!(
        next.admitted,
        [SequenceId(2)],
        "all others add as much: the oldest"
    );
    play(&mut s, &next);
    s.remove(SequenceId(1));
    assert_eq!(
        plan_of(&mut s, 1000).admitted,
        [SequenceId(3)],
        "it has waited long enough"
    );

    let mut s = overtaking(2, 64, 64, 0);
    for id in [1, 2, 3] {
        let expert = if id == 2 { 3 } else { 0 };
        submit_at(&mut s, id, hinted(vec![1; 4], 30, Some(expert)), 0);
    }
    assert_eq!(plan_of(&mut s, 10).admitted, [SequenceId(1), SequenceId(2)]);
}

#[test]
fn one_that_fits_better_but_not_into_the_cache_holds_nobody_up() {
    let mut s = overtaking(2, 64, 8, 1000);
    submit_at(&mut s, 1, hinted(vec![1; 4], 20, Some(0)), 0);
    submit_at(&mut s, 2, hinted(vec![1; 4], 4, Some(3)), 0);
    submit_at(&mut s, 3, hinted((0..25).collect(), 4, Some(0)), 0);
    assert_eq!(plan_of(&mut s, 10).admitted, [SequenceId(1), SequenceId(2)]);
}

#[test]
fn a_request_that_can_never_fit_is_refused() {
    let mut s = scheduler(4, 64, 4);
    let fits = Sequence::new(SequenceId(1), request(vec![0; 10], 7), 0);
    assert_eq!(s.submit(fits), Ok(()));
    let not = Sequence::new(SequenceId(2), request(vec![0; 10], 8), 0);
    assert_eq!(s.submit(not), Err(NeverFits { need: 5, have: 4 }));
}

#[test]
fn a_set_back_pauses_longer_each_time() {
    let mut s = scheduler(4, 64, 8);
    submit(&mut s, 1, request(vec![1; 4], 2));
    let mut now = 0;
    let mut pauses = Vec::new();
    for _ in 0..9 {
        let plan = plan_of(&mut s, now);
        assert_eq!(spans(&plan), [(1, 0, 4)]);
        s.set_back(SequenceId(1), now);
        let plan = plan_of(&mut s, now);
        assert!(plan.chunks.is_empty());
        pauses.push((plan.wake_at.unwrap() - now) / 1000);
        now = plan.wake_at.unwrap();
    }
    assert_eq!(pauses, [2, 4, 8, 16, 32, 64, 128, 256, 256]);
    let plan = plan_of(&mut s, now);
    play(&mut s, &plan);
    assert_eq!(s.get(SequenceId(1)).unwrap().setbacks, 0);
}

#[test]
fn prompt_logprobs_bound_the_chunk_and_cover_every_position_once() {
    let mut s = scheduler(2, 64, 32);
    let mut asked = request((0..11).collect(), 0);
    asked.prompt_logprobs = Some(1);
    submit(&mut s, 1, asked);
    let mut seen = Vec::new();
    for _ in 0..20 {
        let plan = plan_of(&mut s, 0);
        for chunk in &plan.chunks {
            assert!(chunk.prompt_logits.len() <= 3);
            seen.extend(chunk.prompt_logits.clone());
            let reports = &mut s.get_mut(chunk.id).unwrap().trace.prompt_logprobs;
            for _ in chunk.prompt_logits.clone() {
                reports.push(crate::sampler::logprobs::report(&[0.0], 0, 0));
            }
        }
        play(&mut s, &plan);
    }
    assert_eq!(seen, (0..10).collect::<Vec<_>>());
    assert!(s.is_empty());
}

#[test]
fn a_shared_prefix_is_computed_once() {
    let mut s = scheduler(4, 64, 32);
    submit(&mut s, 1, request((0..12).collect(), 4));
    let plan = plan_of(&mut s, 0);
    play(&mut s, &plan);
    submit(&mut s, 2, request((0..13).collect(), 4));
    let plan = plan_of(&mut s, 0);
    assert_eq!(spans(&plan), [(1, 12, 1), (2, 12, 1)]);
    assert_eq!((s.pool().stats().queries, s.pool().stats().hits), (25, 12));
    let mut whole = request((0..13).collect(), 4);
    whole.routed_experts = true;
    submit(&mut s, 3, whole);
    assert_eq!(plan_of(&mut s, 0).chunks.last().unwrap().start, 0);
}

/// A page that a chunk writes belongs to that sequence alone, and no page is in two places of a table.
fn check_pages(s: &Scheduler, plan: &Plan) {
    let mut holders: BTreeMap<Page, usize> = BTreeMap::new();
    for sequence in s.sequences() {
        sequence
            .pages
            .iter()
            .for_each(|page| *holders.entry(*page).or_default() += 1);
    }
    assert_eq!(holders.len(), s.pool().used());
    for chunk in &plan.chunks {
        let sequence = s.get(chunk.id).unwrap();
        for position in chunk.start..chunk.start + chunk.len {
            assert_eq!(
                holders[&sequence.pages[position / 4]],
                1,
                "a shared page is written"
            );
        }
    }
}

proptest! {
    /// Whatever arrives, is lost or leaves: bounds hold, positions are computed in order, every
    /// sequence that stays ends with its full answer, and no page is left.
    #[test]
    fn nobody_starves(
        seqs in 1_usize..5,
        tokens in 1_usize..20,
        pages in 6_usize..14,
        mut arrivals in prop::collection::vec((0_usize..30, 1_usize..12, 0_usize..12, any::<bool>()), 1..16),
        losses in prop::collection::vec(any::<prop::sample::Index>(), 0..10),
        leaves in prop::collection::vec((0_usize..60, 0_u64..16), 0..4),
    ) {
        arrivals.sort_unstable();
        let mut s = scheduler(seqs, tokens, pages);
        let mut next = BTreeMap::new();
        let mut answers: BTreeMap<SequenceId, usize> = BTreeMap::new();
        let mut left = Vec::new();
        let mut now = 0;
        let mut losses = losses.into_iter();
        for step in 0..2_000_usize {
            for (i, (at, prompt, answer, reuse)) in arrivals.iter().enumerate() {
                if *at == step {
                    let mut r = request((0..*prompt as u32).map(|t| t / 3).collect(), *answer);
                    r.stop_tokens.clear();
                    r.routed_experts = !reuse;
                    submit(&mut s, i as u64, r);
                }
            }
            for (_, id) in leaves.iter().filter(|(at, _)| *at == step) {
                if s.remove(SequenceId(*id)).is_some() {
                    left.push(SequenceId(*id));
                }
            }
            let oldest = s.sequences().next().map(|q| q.id);
            let mut plan = plan_of(&mut s, now);
            check_pages(&s, &plan);
            prop_assert!(s.running() <= seqs.min(tokens));
            prop_assert!(plan.chunks.iter().map(|c| c.len).sum::<usize>() <= tokens);
            prop_assert!(oldest.is_none_or(|id| !plan.preempted.contains(&id)));
            if plan.wake_at.is_none() && !s.is_empty() {
                prop_assert!(plan.chunks.iter().any(|c| Some(c.id) == oldest), "the oldest waits");
            }
            for id in &plan.preempted {
                next.insert(*id, 0);
            }
            for chunk in &plan.chunks {
                let expected = next.get(&chunk.id).copied().unwrap_or(0);
                prop_assert!(chunk.start == expected || plan.admitted.contains(&chunk.id));
            }
            if let Some(which) = losses.next().filter(|_| !plan.chunks.is_empty()) {
                let lost = plan.chunks.remove(which.index(plan.chunks.len()));
                s.set_back(lost.id, now);
                next.insert(lost.id, lost.start);
            }
            for chunk in &plan.chunks {
                next.insert(chunk.id, chunk.start + chunk.len);
                let sequence = s.get(chunk.id).unwrap();
                answers.insert(chunk.id, sequence.generated() + usize::from(chunk.sample));
            }
            play(&mut s, &plan);
            now += 3_000;
            if s.is_empty() && step > 60 {
                break;
            }
        }
        prop_assert!(s.is_empty(), "{} sequences never ended", s.sequences().count());
        prop_assert_eq!(s.pool().used(), 0);
        for (i, (_, _, answer, _)) in arrivals.iter().enumerate() {
            let id = SequenceId(i as u64);
            if !left.contains(&id) {
                prop_assert_eq!(answers[&id], *answer);
            }
        }
    }

    /// Whatever is expected of whom: who has waited for its patience is passed by nobody, and everybody ends.
    #[test]
    fn nobody_is_passed_beyond_the_patience(
        seqs in 1_usize..5,
        tokens in 1_usize..20,
        pages in 6_usize..14,
        patience in 0_u64..200_000,
        arrivals in prop::collection::vec(
            (0_usize..40, 1_usize..12, 1_usize..12, prop::option::of(0_usize..4)), 1..24),
    ) {
        let mut arrivals = arrivals;
        arrivals.sort_unstable();
        let mut s = overtaking(seqs, tokens, pages, patience);
        let mut answers: BTreeMap<SequenceId, usize> = BTreeMap::new();
        let mut now = 0;
        for step in 0..3_000_usize {
            for (id, (at, prompt, answer, expert)) in arrivals.iter().enumerate() {
                if *at == step {
                    submit_at(&mut s, id as u64, hinted(vec![7; *prompt], *answer, *expert), now);
                }
            }
            let waiting: Vec<(SequenceId, u64)> = s
                .sequences()
                .filter(|q| q.state() == State::Waiting)
                .map(|q| (q.id, q.arrived))
                .collect();
            let plan = plan_of(&mut s, now);
            check_pages(&s, &plan);
            for (at, id) in plan.admitted.iter().enumerate() {
                let passed = waiting.iter().filter(|(other, arrived)| {
                    other < id && !plan.admitted[..at].contains(other) && now - arrived >= patience
                });
                prop_assert_eq!(passed.count(), 0, "{:?} passed one that has waited", id);
            }
            for chunk in plan.chunks.iter().filter(|chunk| chunk.sample) {
                *answers.entry(chunk.id).or_default() += 1;
            }
            play(&mut s, &plan);
            now += 3_000;
            if s.is_empty() && step > 60 {
                break;
            }
        }
        prop_assert!(s.is_empty(), "{} sequences never ended", s.sequences().count());
        prop_assert_eq!(s.pool().used(), 0);
        for (id, (_, _, answer, _)) in arrivals.iter().enumerate() {
            prop_assert_eq!(answers[&SequenceId(id as u64)], *answer);
        }
    }
}
