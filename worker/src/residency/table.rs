//! The table of resident experts. Readers take a snapshot; the one writer replaces it.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwap;
use foregate_api::ids::{ExpertId, LayerId};
use foregate_api::model::ModelSpec;
use foregate_models::ExpertWeights;

/// One expert of one layer.
pub type Item = (LayerId, ExpertId);

/// What is resident, at one moment.
pub struct Resident {
    experts: usize,
    weights: Vec<Option<Arc<ExpertWeights>>>,
}

impl fmt::Debug for Resident {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Resident")
            .field("experts", &self.weights.iter().flatten().count())
            .finish_non_exhaustive()
    }
}

impl Resident {
    /// The experts of a layer, here or not.
    pub fn experts(&self) -> impl Iterator<Item = ExpertId> + use<> {
        (0..index(self.experts)).map(ExpertId)
    }

    /// An expert's weights, if they are here.
    #[must_use]
    pub fn get(&self, layer: LayerId, expert: ExpertId) -> Option<&Arc<ExpertWeights>> {
        if expert.index() >= self.experts {
            return None;
        }
        let at = layer.index().checked_mul(self.experts)? + expert.index();
        self.weights.get(at)?.as_ref()
    }
}

/// The resident experts of one worker.
#[derive(Debug)]
pub struct Residency {
    layers: usize,
    experts: usize,
    table: ArcSwap<Resident>,
    writing: Mutex<()>,
}

impl Residency {
    /// An empty table for a model's experts.
    #[must_use]
    pub fn new(spec: &ModelSpec) -> Self {
        let (layers, experts) = (spec.moe_layers(), spec.experts);
        Self {
            layers,
            experts,
            table: ArcSwap::from_pointee(Resident {
                experts,
                weights: vec![None; layers * experts],
            }),
            writing: Mutex::default(),
        }
    }

    /// MoE layers and experts per layer.
    #[must_use]
    pub const fn shape(&self) -> (usize, usize) {
        (self.layers, self.experts)
    }

    /// What is resident now. Weights taken from the snapshot stay valid after a release.
    #[must_use]
    pub fn snapshot(&self) -> Arc<Resident> {
        self.table.load_full()
    }

    /// One expert, if it is resident.
    #[must_use]
    pub fn get(&self, layer: LayerId, expert: ExpertId) -> Option<Arc<ExpertWeights>> {
        self.table.load().get(layer, expert).cloned()
    }

    /// Adds experts; one outside the model's shape is ignored.
    pub fn insert(&self, experts: impl IntoIterator<Item = (Item, Arc<ExpertWeights>)>) {
        self.change(|weights, at| {
            for ((layer, expert), loaded) in experts {
                if let Some(slot) = at(layer, expert).and_then(|at| weights.get_mut(at)) {
                    *slot = Some(loaded);
                }
            }
        });
    }

    /// Forgets experts. Their memory is freed when the last call that uses them ends.
    pub fn remove(&self, items: &[Item]) {
        if items.is_empty() {
            return;
        }
        self.change(|weights, at| {
            for (layer, expert) in items {
                if let Some(slot) = at(*layer, *expert).and_then(|at| weights.get_mut(at)) {
                    *slot = None;
                }
            }
        });
    }

    /// Every resident expert.
    #[must_use]
    pub fn items(&self) -> BTreeSet<Item> {
        let table = self.table.load();
        let mut items = BTreeSet::new();
        for (at, slot) in table.weights.iter().enumerate() {
            if slot.is_some() {
                items.insert((
                    LayerId(index(at / self.experts)),
                    ExpertId(index(at % self.experts)),
                ));
            }
        }
        items
    }

    /// Number of resident experts, over all layers.
    #[must_use]
    pub fn len(&self) -> usize {
        self.table.load().weights.iter().flatten().count()
    }

    /// Whether nothing is resident.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn change(
        &self,
        edit: impl FnOnce(
            &mut Vec<Option<Arc<ExpertWeights>>>,
            &dyn Fn(LayerId, ExpertId) -> Option<usize>,
        ),
    ) {
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut weights = self.table.load().weights.clone();
        let at = |layer: LayerId, expert: ExpertId| {
            let fits = layer.index() < self.layers && expert.index() < self.experts;
            fits.then(|| layer.index() * self.experts + expert.index())
        };
        edit(&mut weights, &at);
        self.table.store(Arc::new(Resident {
            experts: self.experts,
            weights,
        }));
    }
}

/// Layers × experts of a model fit 32 bits by far.
const fn index(at: usize) -> u32 {
    at as u32
}
