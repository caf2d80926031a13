//! Which sequence owns which page of the KV cache, and which full pages can be used again.
//!
//! ```text
//!   free ──take──▶ owned (refs ≥ 1) ──give back──▶ free            page without a name
//!                    │  ▲                └───────▶ cached (LRU)    page with a name
//!                 publish └────── found by name ─────┘ │
//!                                 free ◀── evicted ────┘ when no free page is left
//! ```
//!
//! A full page gets a *name*: the hash of its predecessor's name and its own tokens, so that equal
//! names mean equal prefixes. A page found by name is used only if its tokens are equal as well.
//! Only whole pages are shared and shared pages are never written, so no copy is ever needed.

use std::collections::BTreeMap;

use foregate_wire::prefix::short;
pub use foregate_wire::prefix::{Name, ROOT, name};

/// A page of the KV cache.
pub type Page = u32;

/// How often prompts found their beginning.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PrefixStats {
    /// Prompt tokens looked up.
    pub queries: u64,
    /// Prompt tokens found.
    pub hits: u64,
}

/// Names that came and went, in their short form; none is in both.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Changes {
    /// Published.
    pub added: Vec<u64>,
    /// Evicted.
    pub removed: Vec<u64>,
}

#[derive(Debug, Clone, Default)]
struct Entry {
    /// Sequences that hold the page.
    refs: u32,
    /// Its name and tokens, once it is full and published.
    named: Option<(Name, Box<[u32]>)>,
    /// Key in `idle` while nobody holds it but its name is known.
    idle_since: u64,
}

/// Owner of all pages. Pure: it moves numbers, the floats lie elsewhere.
#[derive(Debug)]
pub struct PagePool {
    page_tokens: usize,
    entries: Vec<Entry>,
    free: Vec<Page>,
    by_name: BTreeMap<Name, Page>,
    /// Cached pages that nobody holds, by the tick of their release: the first is evicted first.
    idle: BTreeMap<u64, Page>,
    tick: u64,
    stats: PrefixStats,
    /// What changed since it was last asked for, while somebody wants to know.
    changes: Option<Changes>,
}

impl PagePool {
    /// A pool of `pages` pages of `page_tokens` tokens.
    #[must_use]
    pub fn new(pages: usize, page_tokens: usize) -> Self {
        Self {
            page_tokens: page_tokens.max(1),
            entries: vec![Entry::default(); pages],
            free: (0..pages as Page).rev().collect(),
            by_name: BTreeMap::new(),
            idle: BTreeMap::new(),
            tick: 0,
            stats: PrefixStats::default(),
            changes: None,
        }
    }

    /// Names of all pages that could be found, in their short form. From here on changes are noted.
    pub fn tell_names(&mut self) -> Vec<u64> {
        self.changes = Some(Changes::default());
        self.by_name.keys().map(short).collect()
    }

    /// What changed since the last call, if anything did. With `wanted` false nothing is noted any more.
    pub fn take_changes(&mut self, wanted: bool) -> Option<Changes> {
        if !wanted {
            self.changes = None;
        }
        let changes = self.changes.as_mut()?;
        if changes.added.is_empty() && changes.removed.is_empty() {
            return None;
        }
        let mut taken = std::mem::take(changes);
        // A name that went and came again within a step is there.
        if !taken.removed.is_empty() {
            let by_name = &self.by_name;
            let there = |name: &u64| {
                let mut from = ROOT;
                from[..8].copy_from_slice(&name.to_le_bytes());
                by_name
                    .range(from..)
                    .next()
                    .is_some_and(|(found, _)| short(found) == *name)
            };
            taken.added.retain(there);
            taken.removed.retain(|name| !there(name));
        }
        Some(taken)
    }

    /// Tokens of a page.
    #[must_use]
    pub fn page_tokens(&self) -> usize {
        self.page_tokens
    }

    /// Pages in total.
    #[must_use]
    pub fn pages(&self) -> usize {
        self.entries.len()
    }

    /// Pages that could be taken now: free ones and cached ones that nobody holds.
    #[must_use]
    pub fn available(&self) -> usize {
        self.free.len() + self.idle.len()
    }

    /// Pages that sequences hold.
    #[must_use]
    pub fn used(&self) -> usize {
        self.pages() - self.available()
    }

    /// Pages that `tokens` tokens need.
    #[must_use]
    pub fn pages_for(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.page_tokens)
    }

    /// Prefix statistics since start.
    #[must_use]
    pub fn stats(&self) -> PrefixStats {
        self.stats
    }

    /// Counts a look-up of `queried` prompt tokens that found `hits`.
    pub fn count_lookup(&mut self, queried: usize, hits: usize) {
        self.stats.queries += queried as u64;
        self.stats.hits += hits as u64;
    }

    /// Takes `count` pages, all or none. Evicts the longest unused cached pages if it must.
    pub fn take(&mut self, count: usize) -> Option<Vec<Page>> {
        if count > self.available() {
            return None;
        }
        Some((0..count).filter_map(|_| self.take_one()).collect())
    }

    /// Takes one page.
    pub fn take_one(&mut self) -> Option<Page> {
        let page = match self.free.pop() {
            Some(page) => page,
            None => self.evict()?,
        };
        self.entries[page as usize].refs = 1;
        Some(page)
    }

    fn evict(&mut self) -> Option<Page> {
        let (_, page) = self.idle.pop_first()?;
        if let Some((name, _)) = self.entries[page as usize].named.take() {
            self.by_name.remove(&name);
            if let Some(changes) = &mut self.changes {
                changes.removed.push(short(&name));
            }
        }
        Some(page)
    }

    /// Finds and takes the cached pages of the longest prefix of `tokens` in whole pages, with their
    /// names. Never all of the tokens: the last one must be computed to give a logit.
    pub fn take_prefix(&mut self, tokens: &[u32]) -> (Vec<Page>, Vec<Name>) {
        let (mut pages, mut names) = (Vec::new(), Vec::new());
        let limit = tokens.len().saturating_sub(1) / self.page_tokens;
        let mut parent = ROOT;
        for block in tokens.chunks_exact(self.page_tokens).take(limit) {
            let name = name(&parent, block);
            let Some(page) = self.find(&name, block) else {
                break;
            };
            self.hold(page);
            pages.push(page);
            names.push(name);
            parent = name;
        }
        (pages, names)
    }

    fn find(&self, name: &Name, tokens: &[u32]) -> Option<Page> {
        let page = *self.by_name.get(name)?;
        let (_, held) = self.entries[page as usize].named.as_ref()?;
        (**held == *tokens).then_some(page)
    }

    fn hold(&mut self, page: Page) {
        let entry = &mut self.entries[page as usize];
        if entry.refs == 0 {
            self.idle.remove(&entry.idle_since);
        }
        entry.refs += 1;
    }

    /// Makes a full page that the caller holds known under its name. A second page of the same name
    /// stays nameless. Returns the name for the page after it.
    pub fn publish(&mut self, page: Page, parent: &Name, tokens: &[u32]) -> Name {
        let name = name(parent, tokens);
        let entry = &mut self.entries[page as usize];
        if entry.named.is_none() && !self.by_name.contains_key(&name) {
            entry.named = Some((name, tokens.into()));
            self.by_name.insert(name, page);
            if let Some(changes) = &mut self.changes {
                changes.added.push(short(&name));
            }
        }
        name
    }

    /// Gives a sequence's pages back. The last ones become the first to be evicted, so that of a
    /// prefix the beginning stays longest.
    pub fn give_back(&mut self, pages: &[Page]) {
        for page in pages.iter().rev() {
            self.release(*page);
        }
    }

    fn release(&mut self, page: Page) {
        let entry = &mut self.entries[page as usize];
        debug_assert!(entry.refs > 0, "page {page} given back twice");
        entry.refs = entry.refs.saturating_sub(1);
        if entry.refs > 0 {
            return;
        }
        if entry.named.is_some() {
            self.tick += 1;
            entry.idle_since = self.tick;
            self.idle.insert(self.tick, page);
        } else {
            self.free.push(page);
        }
    }
}

#[cfg(test)]
mod tests;
