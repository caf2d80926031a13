//! What is known of a prompt's experts before a worker reads it, and how right that was.

use std::sync::{Arc, Mutex, PoisonError};

use foregate_wire::generation::{ExpertHint, Finished};
use tokio::time::Instant;

use super::Upstream;
use crate::calibration::{Calibration, Ended, Predictor, State};
use crate::forecast::Words;
use crate::heat::{Heat, OfTenant};
use crate::signature::{Known, Profile, Signature};
use crate::traffic::Tenant;

/// What predictors say of a prompt.
#[derive(Debug, Clone, Default)]
pub(super) struct Foreseen {
    /// By the longest known prefix.
    pub(super) prefix: Known,
    /// By the kinds of text that its words resemble.
    pub(super) kinds: Option<Arc<Signature>>,
    /// The words themselves, if anybody counts what is to come.
    pub(super) words: Option<Words>,
}

/// What ended sequences have shown.
#[derive(Debug)]
pub(super) struct Hindsight {
    began: Instant,
    calibration: Mutex<Calibration>,
    heat: Mutex<Heat>,
}

impl Default for Hindsight {
    fn default() -> Self {
        Self {
            began: Instant::now(),
            calibration: Mutex::default(),
            heat: Mutex::default(),
        }
    }
}

impl Hindsight {
    fn now_ms(&self) -> f64 {
        self.began.elapsed().as_secs_f64() * 1000.0
    }

    fn calibration<T>(&self, ask: impl FnOnce(&mut Calibration) -> T) -> T {
        ask(&mut self
            .calibration
            .lock()
            .unwrap_or_else(PoisonError::into_inner))
    }

    fn heat<T>(&self, ask: impl FnOnce(&mut Heat) -> T) -> T {
        ask(&mut self.heat.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Upstream {
    /// What every predictor says of a prompt, believed or not: at the end it is compared.
    pub(super) fn foresight(&self, prompt: &[u32]) -> Foreseen {
        let model = self.views.load();
        let words = self.outlook.as_ref().map(|_| Words::of(prompt));
        let guess = model.model().and_then(|model| {
            let shape = (model.moe_layers(), model.experts);
            let outlook = self.outlook.as_ref()?;
            outlook.guess(words.as_ref()?, shape, model.top_k)
        });
        Foreseen {
            prefix: self.signatures.known(prompt),
            kinds: guess.map(Arc::new),
            words,
        }
    }

    /// What a request is routed by: a known prefix, else, where requests wait for their place in the window, the kinds of
    /// text that its words resemble. Who is not believed is not asked.
    pub(super) fn known(&self, foreseen: &Foreseen) -> Known {
        let prefix = self.by_prefix(&foreseen.prefix);
        if prefix.signature.is_some() {
            return prefix;
        }
        let asked = self.is_windowed() && self.believes(Predictor::Kinds);
        Known {
            signature: foreseen.kinds.clone().filter(|_| asked),
            tokens: 0,
        }
    }

    /// What a worker is told of a sequence: by its prefix, else by its words; `None` where hints are off, or who would say
    /// something is not believed.
    pub(super) fn hint(&self, foreseen: &Foreseen) -> Option<ExpertHint> {
        if !self.hints {
            return None;
        }
        let kinds = || {
            foreseen
                .kinds
                .clone()
                .filter(|_| self.believes(Predictor::Kinds))
        };
        let said = self.by_prefix(&foreseen.prefix).signature.or_else(kinds)?;
        let top_k = self.views.load().model()?.top_k;
        let (layers, roots) = Profile::hint(&said, top_k)?;
        Some(ExpertHint { layers, roots })
    }

    /// What is remembered of a prefix, if that is believed.
    pub(super) fn by_prefix(&self, known: &Known) -> Known {
        match self.believes(Predictor::Prefix) {
            true => known.clone(),
            false => Known::default(),
        }
    }

    /// Whether a predictor was better than the mean of all answers when it was last looked at.
    pub(super) fn believes(&self, predictor: Predictor) -> bool {
        self.hindsight
            .calibration(|calibration| calibration.believes(predictor))
    }

    /// How right predictors were.
    #[must_use]
    pub fn predictors(&self) -> [State; 3] {
        self.hindsight
            .calibration(|calibration| calibration.states())
    }

    /// What the most active tenants asked of the experts.
    #[must_use]
    pub fn heat(&self, hottest: usize) -> Vec<OfTenant> {
        self.hindsight.heat(|heat| heat.tenants(hottest))
    }

    /// Parts of an expert's rows that tenants brought.
    pub(crate) fn heated_by(&self, layer: usize, expert: usize) -> Vec<(String, f64)> {
        self.hindsight.heat(|heat| heat.of_expert(layer, expert))
    }

    /// A sequence has ended whose worker computed `read` rows of its prompt, and all of its answer.
    pub(super) fn look_back(
        &self,
        foreseen: Foreseen,
        prompt: Option<Arc<Signature>>,
        read: &[u32],
        finished: &Finished,
        tenant: Option<&Tenant>,
    ) {
        let view = self.views.load();
        let Some(model) = view.model() else { return };
        let now_ms = self.hindsight.now_ms();
        if let Some(tenant) = tenant {
            self.hindsight
                .heat(|heat| heat.note(now_ms, tenant, model.experts, &finished.signature));
        }
        let answer = rest(model.experts, &finished.signature, read);
        let Some(answer) = answer.filter(|_| model.moe_layers() > 0) else {
            return;
        };
        let ended = Ended {
            answer,
            foreseen: [foreseen.prefix.signature, foreseen.kinds, prompt],
        };
        self.hindsight
            .calibration(|calibration| calibration.note(now_ms, &ended, model.top_k));
    }
}

/// The whole without a part of it; `None` if they do not belong together, or nothing is left.
pub(super) fn rest(experts: usize, whole: &[u32], part: &[u32]) -> Option<Signature> {
    let fits = whole.len() == part.len();
    let both = whole.iter().zip(part);
    let rest = both
        .map(|(whole, part)| whole.saturating_sub(*part))
        .collect();
    fits.then(|| Signature::new(experts, rest)).flatten()
}
