use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

/// Every page is in exactly one place, and the books about it agree.
fn check(pool: &PagePool, held: &[Vec<Page>]) {
    let mut refs = vec![0_u32; pool.pages()];
    held.iter()
        .flatten()
        .for_each(|page| refs[*page as usize] += 1);
    let free: BTreeSet<Page> = pool.free.iter().copied().collect();
    let idle: BTreeSet<Page> = pool.idle.values().copied().collect();
    assert_eq!(free.len(), pool.free.len(), "a page is free twice");
    assert_eq!(idle.len(), pool.idle.len(), "a page is idle twice");
    for page in 0..pool.pages() as Page {
        let entry = &pool.entries[page as usize];
        assert_eq!(entry.refs, refs[page as usize], "holders of page {page}");
        let places = [entry.refs > 0, free.contains(&page), idle.contains(&page)];
        assert_eq!(
            places.iter().filter(|there| **there).count(),
            1,
            "page {page}"
        );
        assert_eq!(
            idle.contains(&page),
            entry.refs == 0 && entry.named.is_some()
        );
        if let Some((name, _)) = &entry.named {
            assert_eq!(pool.by_name.get(name), Some(&page));
        }
    }
    let named = pool
        .entries
        .iter()
        .filter(|entry| entry.named.is_some())
        .count();
    assert_eq!(named, pool.by_name.len());
    assert_eq!(pool.used(), refs.iter().filter(|n| **n > 0).count());
}

/// Admits a sequence as the scheduler does: prefix first, fresh pages for the rest, publish full ones.
fn admit(pool: &mut PagePool, tokens: &[u32]) -> Option<Vec<Page>> {
    let (mut pages, names) = pool.take_prefix(tokens);
    let fresh = pool.pages_for(tokens.len()) - pages.len();
    let Some(more) = pool.take(fresh) else {
        pool.give_back(&pages);
        return None;
    };
    let found = pages.len();
    pages.extend(more);
    let mut parent = names.last().copied().unwrap_or(ROOT);
    let blocks = tokens.chunks_exact(pool.page_tokens());
    for (page, block) in pages.iter().zip(blocks).skip(found) {
        parent = pool.publish(*page, &parent, block);
    }
    Some(pages)
}

proptest! {
    #[test]
    fn no_page_is_lost_or_owned_twice(
        pages in 1_usize..12,
        page_tokens in 1_usize..4,
        steps in prop::collection::vec((prop::collection::vec(0_u32..2, 1..14), any::<bool>(), any::<prop::sample::Index>()), 1..80),
    ) {
        let mut pool = PagePool::new(pages, page_tokens);
        let mut held: Vec<Vec<Page>> = Vec::new();
        for (tokens, leave, which) in steps {
            if leave && !held.is_empty() {
                let pages = held.swap_remove(which.index(held.len()));
                pool.give_back(&pages);
            } else if let Some(pages) = admit(&mut pool, &tokens) {
                held.push(pages);
            }
            check(&pool, &held);
        }
        held.drain(..).for_each(|pages| pool.give_back(&pages));
        check(&pool, &[]);
        prop_assert_eq!(pool.available(), pages);
    }
}

#[test]
fn a_prefix_is_found_while_held_and_after() {
    let mut pool = PagePool::new(4, 2);
    let first = admit(&mut pool, &[1, 2, 3, 4, 5]).unwrap();
    let (pages, _) = pool.take_prefix(&[1, 2, 3, 4, 9]);
    assert_eq!(pages, first[..2]);
    pool.give_back(&pages);
    pool.give_back(&first);
    let (pages, _) = pool.take_prefix(&[1, 2, 3, 9, 9]);
    assert_eq!(pages, first[..1]);
    let (other, _) = pool.take_prefix(&[3, 4, 1, 2, 5]);
    assert!(
        other.is_empty(),
        "a block counts only behind its own beginning"
    );
}

#[test]
fn the_last_token_is_always_left_to_compute() {
    let mut pool = PagePool::new(4, 2);
    let held = admit(&mut pool, &[1, 2, 3, 4]).unwrap();
    assert_eq!(pool.take_prefix(&[1, 2, 3, 4]).0, held[..1]);
    assert!(pool.take_prefix(&[1, 2]).0.is_empty());
    assert!(pool.take_prefix(&[]).0.is_empty());
}

#[test]
fn equal_names_with_other_tokens_are_not_used() {
    let mut pool = PagePool::new(2, 2);
    let page = pool.take_one().unwrap();
    pool.publish(page, &ROOT, &[1, 2]);
    let forged = name(&ROOT, &[7, 8]);
    pool.by_name.insert(forged, page);
    assert!(pool.take_prefix(&[7, 8, 9]).0.is_empty());
}

#[test]
fn the_longest_unused_end_is_evicted_first() {
    let mut pool = PagePool::new(4, 1);
    let old = admit(&mut pool, &[1, 2]).unwrap();
    let new = admit(&mut pool, &[3, 4]).unwrap();
    pool.give_back(&old);
    pool.give_back(&new);
    let taken = pool.take(1).unwrap();
    assert_eq!(taken, old[1..]);
    assert_eq!(pool.take_prefix(&[1, 2, 9]).0, old[..1]);
}

#[test]
fn all_or_nothing() {
    let mut pool = PagePool::new(3, 1);
    assert!(pool.take(4).is_none());
    assert_eq!(pool.available(), 3);
    assert_eq!(pool.take(3).map(|pages| pages.len()), Some(3));
    assert!(pool.take_one().is_none());
}

#[test]
fn whoever_follows_the_names_knows_what_is_there() {
    let mut pool = PagePool::new(2, 2);
    let first = pool.take_one().unwrap();
    let one = short(&pool.publish(first, &ROOT, &[1, 2]));
    assert_eq!(pool.take_changes(true), None, "nobody has asked yet");
    assert_eq!(pool.tell_names(), [one]);
    let second = pool.take_one().unwrap();
    let two = short(&pool.publish(second, &ROOT, &[3, 4]));
    let added = |added: &[u64], removed: &[u64]| {
        Some(Changes {
            added: added.to_vec(),
            removed: removed.to_vec(),
        })
    };
    assert_eq!(pool.take_changes(true), added(&[two], &[]));
    pool.give_back(&[first, second]);
    assert_eq!(pool.take_changes(true), None);
    // Both are evicted; the second comes again under the same name.
    let pages = pool.take(2).unwrap();
    pool.publish(pages[0], &ROOT, &[3, 4]);
    let last = short(&pool.publish(pages[1], &ROOT, &[5, 6]));
    assert_eq!(pool.take_changes(true), added(&[two, last], &[one]));
    pool.give_back(&pages);
    pool.take(1).unwrap();
    assert_eq!(
        pool.take_changes(false),
        None,
        "nobody wants to know any more"
    );
    assert_eq!(pool.take_changes(true), None);
}
