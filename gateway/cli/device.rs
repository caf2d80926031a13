//! The cards of this machine, for workers.

use std::sync::Arc;

use foregate_cuda::comm::{FLOOR, Library, StagedComms};
use foregate_cuda::{Cuda, Staged};
use foregate_kernels::Cpu;
use foregate_worker::{Card, Cards};

/// Those that the machine's driver has, and the NCCL that the loader finds.
pub(crate) fn cards() -> Cards {
    let cards = Cards::new(|number, cpu| {
        let cuda = foregate_cuda::open(number).map_err(|error| error.to_string())?;
        Ok(card(&cuda, cpu))
    });
    cards.with_comms(|number| {
        let library = Library::open(None).map_err(|error| {
            format!("{error}: the images for cards have it, or put {FLOOR} or newer on the loader's path (LD_LIBRARY_PATH)")
        })?;
        tracing::info!(version = %library.version(), path = %library.path().display(), "nccl_opened");
        Ok(Arc::new(StagedComms::on_card(library, number)))
    })
}

fn card(cuda: &Cuda, cpu: &Cpu) -> Card {
    Card {
        name: cuda.driver().name().to_owned(),
        executor: Arc::new(cuda.clone()),
        ops: Arc::new(Staged::new(cuda.clone(), cpu.clone())),
        callee_ops: Arc::new(Staged::new(cuda.clone(), cpu.clone())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Most machines and builds that test have no card; what is missing is said, with what helps.
    #[test]
    fn a_card_that_is_not_there_is_told_with_a_remedy() {
        match cards().open(0, &Cpu::new(1)) {
            Ok(card) => assert!(!card.name.is_empty()),
            Err(why) => assert!(
                why.contains("--features cuda")
                    || why.contains("driver")
                    || why.contains("GPU"),
                "{why}"
            ),
        }
    }
}
