//! Whether the tensors are those that the configuration calls for, and how each part's matrices stand.

use std::collections::BTreeSet;
use std::path::Path;

use foregate_api::weights::Part;

use crate::error::CheckpointError;
use crate::index::{Index, Tensor};
use crate::names::{self, Expected, Kind};
use crate::spec::{Config, Scheme};
use crate::stored::mxfp4::Fused;
use crate::stored::{Layout, Layouts, Source, VECTORS};

/// Checks every tensor's presence, shape and format.
///
/// # Errors
/// Names the first tensor that is missing, odd or unknown.
pub(crate) fn tensors(
    dir: &Path,
    config: &Config,
    index: &Index,
) -> Result<Layouts, CheckpointError> {
    let plain = config.spec.formats;
    let mut check = Check {
        dir,
        config,
        index,
        layouts: Layouts::new(&plain),
        found: BTreeSet::new(),
        known: BTreeSet::new(),
    };
    let fused = check.fused_experts()?;
    for want in names::expected(&config.spec) {
        match want.kind {
            Kind::Matrix(Part::Expert) if fused => {}
            Kind::Matrix(part) => check.matrix(part, &want)?,
            Kind::Vector => check.source(Source {
                name: want.name,
                shape: want.shape,
                dtypes: VECTORS,
                optional: false,
            })?,
        }
    }
    check.nothing_else()?;
    let mut layouts = check.layouts;
    if config.spec.tied_embeddings {
        layouts.set(Part::Output, layouts.of(Part::Embedding));
    }
    Ok(layouts)
}

struct Check<'a> {
    dir: &'a Path,
    config: &'a Config,
    index: &'a Index,
    layouts: Layouts,
    /// Parts of which a matrix was seen.
    found: BTreeSet<Part>,
    /// Tensors that belong to the model.
    known: BTreeSet<String>,
}

impl Check<'_> {
    /// The experts of all mixtures, if they stand in fused tensors.
    fn fused_experts(&mut self) -> Result<bool, CheckpointError> {
        let spec = &self.config.spec;
        if self.scheme() != Some(Scheme::Mxfp4) {
            return Ok(false);
        }
        let mixtures = (0..spec.layers).filter(|block| spec.moe_blocks[*block]);
        let all: Vec<Fused> = mixtures.map(|block| Fused::of(spec, block)).collect();
        if !all.iter().any(|fused| fused.is_in(self.index)) {
            return Ok(false);
        }
        for source in all.iter().flat_map(Fused::sources) {
            self.source(source)?;
        }
        let layout = Layout::Quantized(Scheme::Mxfp4);
        self.layouts.set(Part::Expert, layout);
        Ok(true)
    }

    fn matrix(&mut self, part: Part, want: &Expected) -> Result<(), CheckpointError> {
        let (name, shape) = (&want.name, &want.shape);
        let plain = self.config.spec.formats.of(part);
        let layout = Layout::detect(self.index, self.scheme(), plain, name);
        if layout != Layout::Plain(plain) {
            self.not_exempt(name)?;
        }
        let (n, k) = (shape[0], shape[1]);
        for source in layout.sources(name, n, k) {
            self.source(source)?;
        }
        if self.found.insert(part) {
            self.layouts.set(part, layout);
        } else if self.layouts.of(part) != layout {
            return Err(CheckpointError::Mixed {
                dir: self.dir.to_owned(),
                name: name.clone(),
                part,
                expected: self.layouts.of(part).format().to_string(),
                found: layout.format().to_string(),
            });
        }
        Ok(())
    }

    /// A module that the configuration exempts by its full name has plain tensors.
    fn not_exempt(&self, name: &str) -> Result<(), CheckpointError> {
        let module = name.strip_suffix(".weight").unwrap_or(name);
        let quantized = self.config.quantized.as_ref();
        let exempt = quantized.is_some_and(|q| q.exempt.iter().any(|one| one == module));
        if exempt {
            return Err(CheckpointError::Exempt {
                dir: self.dir.to_owned(),
                module: module.to_owned(),
            });
        }
        Ok(())
    }

    fn source(&mut self, want: Source) -> Result<(), CheckpointError> {
        let found = self.index.get(&want.name);
        let fits = match &found {
            Some(tensor) => want.fits(tensor),
            None => want.optional,
        };
        if !fits {
            return Err(CheckpointError::Tensor {
                dir: self.dir.to_owned(),
                expected: want.describe(),
                found: found.map_or_else(|| "none".to_owned(), |tensor| describe(&tensor)),
                name: want.name,
            });
        }
        self.known.insert(want.name);
        Ok(())
    }

    fn nothing_else(&self) -> Result<(), CheckpointError> {
        let spec = &self.config.spec;
        let mut extra = self
            .index
            .names()
            .filter(|name| !self.known.contains(*name) && !names::is_known_extra(spec, name));
        match extra.next() {
            None => Ok(()),
            Some(first) => Err(CheckpointError::Unexpected {
                dir: self.dir.to_owned(),
                first: first.to_owned(),
                count: 1 + extra.count(),
            }),
        }
    }

    fn scheme(&self) -> Option<Scheme> {
        self.config.quantized.as_ref().map(|q| q.scheme)
    }
}

fn describe(tensor: &Tensor<'_>) -> String {
    format!("shape {:?} of {:?}", tensor.shape, tensor.dtype)
}
