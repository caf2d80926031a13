//! What feature `cuda` embeds: one fatbin per family, with code for every card, and nothing without it.

use foregate_cuda::FATBINS;

/// First word of a fatbin.
#[cfg(feature = "cuda")]
const MAGIC: [u8; 4] = 0xba55_ed50_u32.to_le_bytes();

#[cfg(feature = "cuda")]
#[test]
fn every_family_has_code() {
    let mut families: Vec<String> =
        std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/cu"))
            .unwrap()
            .filter_map(|entry| {
                Some(
                    entry
                        .unwrap()
                        .file_name()
                        .to_str()?
                        .strip_suffix(".cu")?
                        .to_owned(),
                )
            })
            .collect();
    families.sort();
    let embedded: Vec<&str> = FATBINS.iter().map(|f| f.family).collect();
    assert_eq!(embedded, families);
    for fatbin in FATBINS {
        assert_eq!(fatbin.bytes[..4], MAGIC, "{}", fatbin.family);
    }
}

#[cfg(not(feature = "cuda"))]
#[test]
fn without_the_feature_there_is_none() {
    assert!(FATBINS.is_empty());
}

/// The driver's library may be there or not: asking does not panic.
#[test]
fn asking_for_the_driver_is_safe() {
    let _present: bool = foregate_cuda::driver_present();
}
