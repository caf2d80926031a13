//! What the driver is, and which cards it has; without either an answer too.

use cudarc::driver::{result, sys};

use crate::driver_present;

/// The CUDA version that the embedded code is of. Older drivers do not take it.
pub const CUDA: (u32, u32) = (13, 0);

/// A card.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CardInfo {
    /// As the driver calls it.
    pub name: String,
    /// Compute capability.
    pub capability: (u32, u32),
    /// Bytes.
    pub memory: u64,
}

/// What the driver says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Probe {
    /// The newest CUDA version that it speaks, or why there is no driver.
    pub driver: Result<(u32, u32), String>,
    /// The cards, in its order, or why it has none. Never empty.
    pub cards: Result<Vec<CardInfo>, String>,
}

/// Asks the driver. Opens its library and initialises it, makes no context; panics nowhere.
#[must_use]
pub fn probe() -> Probe {
    if !driver_present() {
        let why = "libcuda.so.1 cannot be opened";
        return Probe {
            driver: Err(why.to_owned()),
            cards: Err(why.to_owned()),
        };
    }
    Probe {
        driver: version(),
        cards: cards(),
    }
}

/// The cards that this binary carries code for, such as `sm_90a`; none without feature `cuda`.
#[must_use]
pub fn targets() -> &'static [&'static str] {
    if crate::FATBINS.is_empty() {
        &[]
    } else {
        TARGETS
    }
}

/// As `build.rs` asks nvcc for them; a test holds both together.
const TARGETS: &[&str] = &["sm_80", "sm_90a", "sm_100a"];

fn version() -> Result<(u32, u32), String> {
    let mut code = 0;
    // SAFETY: the library is there, `code` outlives the call, and no initialisation is needed for it.
    let result = unsafe { sys::cuDriverGetVersion(&raw mut code) };
    result.result().map_err(|error| error.to_string())?;
    let code = u32::try_from(code).unwrap_or_default();
    Ok((code / 1000, code % 1000 / 10))
}

fn cards() -> Result<Vec<CardInfo>, String> {
    let said = |error: cudarc::driver::DriverError| error.to_string();
    result::init().map_err(said)?;
    let count = result::device::get_count().map_err(said)?;
    if count == 0 {
        return Err("the driver has no card".to_owned());
    }
    (0..count).map(card).collect::<Result<_, _>>().map_err(said)
}

fn card(ordinal: i32) -> Result<CardInfo, cudarc::driver::DriverError> {
    use sys::CUdevice_attribute_enum as Attribute;
    let device = result::device::get(ordinal)?;
    let number = |attribute| {
        // SAFETY: `device` is one that the driver gave.
        let value = unsafe { result::device::get_attribute(device, attribute) };
        value.map(|value| u32::try_from(value).unwrap_or_default())
    };
    // SAFETY: as above.
    let memory = unsafe { result::device::total_mem(device) }?;
    Ok(CardInfo {
        name: result::device::get_name(device)?,
        capability: (
            number(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            number(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
        memory: memory as u64,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_probe_answers_on_any_machine() {
        let probe = probe();
        assert_eq!(probe, super::probe());
        match (&probe.driver, &probe.cards) {
            (Err(why), Err(_)) => assert!(!why.is_empty()),
            (Err(why), Ok(cards)) => panic!("{why}, and cards {cards:?}"),
            (Ok(version), _) => assert!(*version >= (1, 0)),
        }
        assert!(probe.cards.is_err() || !probe.cards.unwrap().is_empty());
    }

    #[test]
    fn targets_are_those_of_the_build() {
        let build = include_str!("../build.rs");
        for target in TARGETS {
            assert!(build.contains(target), "{target}");
        }
        let code = build
            .lines()
            .filter(|line| line.contains("\"arch=compute_"));
        assert_eq!(code.count(), TARGETS.len());
    }
}
