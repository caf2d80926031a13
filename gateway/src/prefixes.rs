//! Which worker's KV cache holds which prompt prefixes, as the workers tell.
//!
//! A page's name stands for the whole prefix that it ends, so a map from names is a radix tree whose edges are pages: a
//! walk from the root follows a prompt page by page until nobody has the next one. A worker tells what it has, then what
//! comes and goes; after a loss it tells all anew, and until then nothing of it counts.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, PoisonError};

use foregate_api::ids::Rank;
use foregate_api::member::Member;
use foregate_wire::prefix::{ROOT, name, short};

/// Pages of a prompt that are looked at.
const PAGES: usize = 4096;

#[derive(Debug, Default)]
struct Index {
    /// Workers that hold the page of a name, ascending.
    holders: BTreeMap<u64, Vec<Rank>>,
    workers: BTreeMap<Rank, Held>,
}

/// What a worker has told.
#[derive(Debug)]
struct Held {
    /// Which process of the worker.
    incarnation: u64,
    page_tokens: usize,
    /// Most names that its cache can have.
    most: usize,
    names: BTreeSet<u64>,
}

/// Prefixes by worker.
#[derive(Debug, Default)]
pub struct Prefixes {
    index: Mutex<Index>,
}

impl Prefixes {
    /// A worker begins to tell, or tells all anew.
    pub fn begin(&self, member: &Member) {
        let worker = member.rank;
        self.with(|index| {
            index.forget(worker);
            let held = Held {
                incarnation: member.incarnation,
                page_tokens: (member.page_tokens as usize).max(1),
                most: member.kv_pages as usize,
                names: BTreeSet::new(),
            };
            index.workers.insert(worker, held);
        });
    }

    /// Takes in what a worker that has begun tells.
    pub fn tell(&self, worker: Rank, added: &[u64], removed: &[u64]) {
        self.with(|index| {
            for name in removed {
                index.remove(worker, *name);
            }
            for name in added {
                index.add(worker, *name);
            }
        });
    }

    /// This process of a worker tells no more; another may have begun already.
    pub fn forget(&self, worker: Rank, incarnation: u64) {
        self.with(|index| {
            if index
                .workers
                .get(&worker)
                .is_some_and(|held| held.incarnation == incarnation)
            {
                index.forget(worker);
            }
        });
    }

    /// Prompt tokens that each worker has, in whole pages. A worker that has told and has none is in it with 0; one that
    /// does not tell is not. The last token is never counted: a worker computes it in any case.
    #[must_use]
    pub fn of(&self, prompt: &[u32]) -> BTreeMap<Rank, u32> {
        self.with(|index| {
            let mut found: BTreeMap<Rank, u32> =
                index.workers.keys().map(|rank| (*rank, 0)).collect();
            let sizes: BTreeSet<usize> = index
                .workers
                .values()
                .map(|held| held.page_tokens)
                .collect();
            for size in sizes {
                index.walk(prompt, size, &mut found);
            }
            found
        })
    }

    /// Whether a worker tells.
    #[must_use]
    pub fn tells(&self, worker: Rank) -> bool {
        self.with(|index| index.workers.contains_key(&worker))
    }

    /// Workers that tell, and names that they have told.
    #[cfg(test)]
    fn size(&self) -> (usize, usize) {
        self.with(|index| (index.workers.len(), index.holders.len()))
    }

    fn with<T>(&self, change: impl FnOnce(&mut Index) -> T) -> T {
        change(&mut self.index.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Index {
    fn walk(&self, prompt: &[u32], size: usize, found: &mut BTreeMap<Rank, u32>) {
        let limit = (prompt.len().saturating_sub(1) / size).min(PAGES);
        let mut parent = ROOT;
        // A prefix is of use only from its beginning on.
        let mut whole: Option<Vec<Rank>> = None;
        for (page, tokens) in prompt.chunks_exact(size).take(limit).enumerate() {
            parent = name(&parent, tokens);
            let Some(holders) = self.holders.get(&short(&parent)) else {
                return;
            };
            let has = |rank: &Rank| {
                whole.as_ref().is_none_or(|whole| whole.contains(rank))
                    && self
                        .workers
                        .get(rank)
                        .is_some_and(|held| held.page_tokens == size)
            };
            let now: Vec<Rank> = holders.iter().copied().filter(has).collect();
            if now.is_empty() {
                return;
            }
            for rank in &now {
                found.insert(*rank, ((page + 1) * size) as u32);
            }
            whole = Some(now);
        }
    }

    fn add(&mut self, worker: Rank, name: u64) {
        let Some(held) = self.workers.get_mut(&worker) else {
            return;
        };
        // A cache has no more names than pages, whatever is told.
        if held.names.len() >= held.most || !held.names.insert(name) {
            return;
        }
        let holders = self.holders.entry(name).or_default();
        if let Err(at) = holders.binary_search(&worker) {
            holders.insert(at, worker);
        }
    }

    fn remove(&mut self, worker: Rank, name: u64) {
        let held = self.workers.get_mut(&worker);
        if held.is_some_and(|held| held.names.remove(&name)) {
            self.drop_holder(worker, name);
        }
    }

    fn drop_holder(&mut self, worker: Rank, name: u64) {
        let Some(holders) = self.holders.get_mut(&name) else {
            return;
        };
        holders.retain(|holder| *holder != worker);
        if holders.is_empty() {
            self.holders.remove(&name);
        }
    }

    fn forget(&mut self, worker: Rank) {
        let names = self.workers.remove(&worker).map(|held| held.names);
        for name in names.unwrap_or_default() {
            self.drop_holder(worker, name);
        }
    }
}

#[cfg(test)]
mod tests {
    use foregate_api::member::Phase;
    use proptest::prelude::*;

    use super::*;

    /// Names of a prompt's pages of two tokens.
    fn names(prompt: &[u32]) -> Vec<u64> {
        let mut parent = ROOT;
        let pages = prompt.chunks_exact(2);
        pages
            .map(|tokens| {
                parent = name(&parent, tokens);
                short(&parent)
            })
            .collect()
    }

    fn member(rank: u32, page_tokens: u32, kv_pages: u32) -> Member {
        let of_model = r#"{"family":"mixtral","formats":{"embedding":"float32","attention":"float32","router":"float32","expert":"float32","dense":"float32","output":"float32"},"vocab":64,"hidden":32,"layers":1,"heads":4,"kv_heads":2,"head_dim":8,"max_positions":256,"rope_theta":10000.0,"norm_eps":0.000001,"qkv_bias":false,"clip_qkv":null,"tied_embeddings":false,"dense_inner":48,"moe_blocks":[true],"experts":8,"top_k":2,"expert_inner":24,"norm_top_k":true,"shared_inner":null,"eos":[2],"bos":1}"#;
        Member {
            rank: Rank(rank),
            incarnation: 7,
            rpc: String::new(),
            exchange: String::new(),
            domain: String::new(),
            slots: 8,
            phase: Phase::Ready,
            model: serde_json::from_str(of_model).unwrap(),
            cpu_path: "portable".into(),
            kv_pages,
            page_tokens,
        }
    }

    fn two() -> Prefixes {
        let prefixes = Prefixes::default();
        (0..2).for_each(|rank| prefixes.begin(&member(rank, 2, 100)));
        prefixes
    }

    #[test]
    fn the_longest_whole_prefix_of_each_worker_is_found() {
        let prefixes = two();
        let prompt: Vec<u32> = (0..9).collect();
        let all = names(&prompt);
        let both = |zero, one| BTreeMap::from([(Rank(0), zero), (Rank(1), one)]);
        prefixes.tell(Rank(0), &all[..1], &[]);
        prefixes.tell(Rank(1), &all, &[]);
        assert_eq!(prefixes.of(&prompt), both(2, 8));
        assert_eq!(
            prefixes.of(&prompt[..8]),
            both(2, 6),
            "the last token is computed anyway"
        );
        assert_eq!(prefixes.of(&[7, 7, 7]), both(0, 0));
        // Without its beginning a prefix is of no use.
        prefixes.tell(Rank(1), &[], &all[..1]);
        assert_eq!(prefixes.of(&prompt), both(2, 0));
        prefixes.tell(Rank(1), &all[..1], &[]);
        assert_eq!(prefixes.of(&prompt), both(2, 8));
        prefixes.begin(&member(1, 2, 100));
        prefixes.tell(Rank(1), &all[..2], &[]);
        assert_eq!(prefixes.of(&prompt), both(2, 4), "told anew");
        prefixes.forget(Rank(1), 6);
        assert!(prefixes.tells(Rank(1)), "another process has begun");
        prefixes.forget(Rank(1), 7);
        assert_eq!(prefixes.of(&prompt), BTreeMap::from([(Rank(0), 2)]));
        prefixes.forget(Rank(0), 7);
        assert_eq!(prefixes.size(), (0, 0));
    }

    #[test]
    fn pages_of_another_size_are_other_prefixes() {
        let prefixes = two();
        prefixes.begin(&member(1, 4, 100));
        let prompt: Vec<u32> = (0..9).collect();
        prefixes.tell(Rank(0), &names(&prompt), &[]);
        prefixes.tell(Rank(1), &[short(&name(&ROOT, &prompt[..4]))], &[]);
        assert_eq!(
            prefixes.of(&prompt),
            BTreeMap::from([(Rank(0), 8), (Rank(1), 4)])
        );
    }

    #[test]
    fn a_worker_has_no_more_names_than_pages_and_none_before_it_begins() {
        let prefixes = Prefixes::default();
        prefixes.tell(Rank(3), &[1, 2], &[]);
        assert_eq!(prefixes.size(), (0, 0));
        prefixes.begin(&member(3, 16, 2));
        prefixes.tell(Rank(3), &[1, 2, 3, 4], &[]);
        assert_eq!(prefixes.size(), (1, 2));
    }

    proptest! {
        /// Whatever is told, the index is what a plain set per worker says.
        #[test]
        fn the_index_is_what_was_told(
            told in prop::collection::vec((0..3_u32, any::<bool>(), 0..12_u64, 0..20_u8), 0..80)
        ) {
            let prefixes = Prefixes::default();
            let mut plain: BTreeMap<Rank, BTreeSet<u64>> = BTreeMap::new();
            for rank in 0..3 {
                prefixes.begin(&member(rank, 2, 1000));
                plain.insert(Rank(rank), BTreeSet::new());
            }
            for (rank, add, name, begins) in told {
                let own = plain.entry(Rank(rank)).or_default();
                if begins == 0 {
                    own.clear();
                    prefixes.begin(&member(rank, 2, 1000));
                }
                if add {
                    own.insert(name);
                    prefixes.tell(Rank(rank), &[name], &[]);
                } else {
                    own.remove(&name);
                    prefixes.tell(Rank(rank), &[], &[name]);
                }
            }
            prefixes.with(|index| {
                for (rank, own) in &plain {
                    prop_assert_eq!(&index.workers[rank].names, own);
                    for name in 0..12 {
                        let holders = index.holders.get(&name);
                        let holds = holders.is_some_and(|all| all.contains(rank));
                        prop_assert_eq!(holds, own.contains(&name));
                    }
                }
                Ok(())
            })?;
        }
    }
}
