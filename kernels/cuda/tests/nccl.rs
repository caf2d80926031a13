//! The NCCL layer against NVIDIA's own library, as far as that goes without a card, and against a library of a few lines
//! (`nccl/scripted.c`) that does what the real one does only in trouble: hang, fail late, be old.
#![expect(
    unsafe_code,
    clippy::disallowed_methods,
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "part of a test; the environment says whether a missing library is a failure"
)]

mod peers;

use std::ffi::c_int;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use foregate_cuda::comm::{
    Buffers, CommError, Communicator, Element, FLOOR, Join, Library, StagedComms, UniqueId,
    Version,
};
use foregate_kernels::{Comms as _, Seat};
use libloading::Library as Opened;
use tempfile::TempDir;

const EPOCH: u64 = 42;
/// Longer than any wait of these tests that ends well.
const LONG: Duration = Duration::from_secs(60);
const SHORT: Duration = Duration::from_millis(100);

/// NVIDIA's library of the pinned version. `None`: it cannot be had here, and need not.
fn real() -> Option<PathBuf> {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../../.ci/nccl");
    let output = Command::new(script).output().unwrap();
    if output.status.success() {
        let path = String::from_utf8(output.stdout).unwrap();
        return Some(PathBuf::from(path.trim()));
    }
    let why = String::from_utf8_lossy(&output.stderr);
    let why = why.lines().last().unwrap_or_default();
    assert!(
        std::env::var_os("FOREGATE_E2E_REQUIRE").is_none(),
        "cannot run and must: {why}"
    );
    let line = format!("skipped: tests with NVIDIA's NCCL: {why}\n");
    print!("{line}");
    if let Some(path) = std::env::var_os("FOREGATE_E2E_SKIPPED") {
        let file = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(path);
        file.and_then(|mut file| file.write_all(line.as_bytes()))
            .unwrap();
    }
    None
}

/// The scripted library, compiled with these definitions.
struct Scripted {
    _folder: TempDir,
    path: PathBuf,
}

impl Scripted {
    fn new(definitions: &[&str]) -> Self {
        let folder = TempDir::new().unwrap();
        let path = folder.path().join("libnccl.so.2");
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/nccl/scripted.c");
        let mut command = Command::new("cc");
        command.args([
            "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-pthread", "-o",
        ]);
        command.arg(&path).arg(source);
        command.args(
            definitions
                .iter()
                .map(|definition| format!("-D{definition}")),
        );
        let output = command.output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{stderr}");
        Self {
            _folder: folder,
            path,
        }
    }

    fn open(&self) -> Arc<Library> {
        Library::open(Some(&self.path)).unwrap()
    }

    /// How often a function was called.
    fn calls(&self, name: &str) -> c_int {
        // SAFETY: the library stands in this folder and has this function.
        unsafe {
            let opened = Opened::new(&self.path).unwrap();
            let counter = opened.get::<unsafe extern "C" fn() -> c_int>(name.as_bytes());
            counter.unwrap()()
        }
    }
}

fn join(ranks: u32, rank: u32, deadline: Duration) -> Join {
    Join {
        id: UniqueId([7; 128]),
        ranks,
        rank,
        epoch: EPOCH,
        deadline,
        abort: SHORT,
    }
}

/// Buffers that nobody reads: the scripted library has no device.
fn buffers() -> Buffers {
    Buffers {
        send: std::ptr::null(),
        recv: std::ptr::null_mut(),
        count: 0,
        element: Element::U8,
    }
}

fn all_to_all(communicator: &mut Communicator) -> Result<(), CommError> {
    // SAFETY: the scripted library touches no memory.
    unsafe { communicator.all_to_all(buffers(), std::ptr::null_mut()) }
}

#[test]
fn the_real_library_tells_its_version_and_what_it_has() {
    let Some(path) = real() else { return };
    let library = Library::open(Some(&path)).unwrap();
    assert_eq!(
        library.version(),
        Version {
            major: 2,
            minor: 28,
            patch: 9
        }
    );
    let optional = library.optional();
    assert!(optional.comm_revoke.is_some(), "2.28.9 exports it");
    assert!(optional.comm_shrink.is_some() && optional.mem_alloc.is_some());
    assert!(optional.window_register.is_some() && optional.window_deregister.is_some());
    assert!(!optional.has_comm_grow, "it came with 2.29");
}

#[test]
fn the_real_library_makes_ids_without_a_card() {
    let Some(path) = real() else { return };
    let library = Library::open(Some(&path)).unwrap();
    let (first, second) = (library.unique_id().unwrap(), library.unique_id().unwrap());
    assert_ne!(first, second);
    assert_ne!(first, UniqueId([0; 128]));
}

/// Joining needs a driver. Without one it is an error that says who, what and why, and no hang.
#[test]
fn the_real_library_refuses_to_join_without_a_driver() {
    let Some(path) = real() else { return };
    if foregate_cuda::driver_present() {
        println!("skipped: there is a driver here");
        return;
    }
    let library = Library::open(Some(&path)).unwrap();
    let id = library.unique_id().unwrap();
    for (ranks, rank) in [(1, 0), (2, 1)] {
        let begun = Instant::now();
        let wanted = Join {
            id,
            ..join(ranks, rank, Duration::from_secs(10))
        };
        let error = Communicator::join(&library, wanted).unwrap_err();
        assert!(
            begun.elapsed() < LONG,
            "{error} after {:?}",
            begun.elapsed()
        );
        let CommError::Call {
            call,
            code,
            text,
            rank: who,
            epoch,
        } = &error
        else {
            panic!("{error:?}")
        };
        assert_eq!(
            (*call, *who, *epoch),
            ("ncclCommInitRankConfig", rank, EPOCH)
        );
        assert!(*code > 0 && !text.is_empty(), "{error}");
        let line = error.to_string();
        assert!(line.contains("epoch 42") && !line.contains('\n'), "{line}");
    }
}

/// The same for groups whose rows are staged: the library's words where it is asked first, the driver's where it is.
#[test]
fn staged_groups_over_the_real_library_say_that_there_is_no_driver() {
    let Some(path) = real() else { return };
    if foregate_cuda::driver_present() {
        println!("skipped: there is a driver here");
        return;
    }
    let library = Library::open(Some(&path)).unwrap();
    let lanes: [(StagedComms, &str); 2] = [
        (
            StagedComms::new(Arc::clone(&library), || {
                Ok(Box::new(peers::EmulatedLane::default()))
            }),
            "on rank 1 of epoch 42",
        ),
        (StagedComms::on_card(library, 0), "no NVIDIA driver"),
    ];
    for (comms, words) in lanes {
        let id = comms.new_id().unwrap();
        assert_eq!(id.len(), 128);
        let begun = Instant::now();
        let fault = comms
            .join(Seat {
                id: &id,
                ranks: 2,
                rank: 1,
                epoch: EPOCH,
                deadline: begun + LONG,
                wanted: &|| true,
            })
            .unwrap_err();
        assert_eq!(fault.call, "ncclCommInitRankConfig");
        assert!(fault.why.contains(words), "{fault}");
        assert!(begun.elapsed() < LONG / 2, "{:?}", begun.elapsed());
    }
}

/// A call that does not fit the group costs that rank its place, and not the process.
#[test]
fn staged_groups_refuse_what_does_not_fit() {
    let comms = peers::comms(peers::Gone::Silent);
    let id = comms.new_id().unwrap();
    let soon = Instant::now() + LONG;
    let seat = || Seat {
        id: &id,
        ranks: 1,
        rank: 0,
        epoch: EPOCH,
        deadline: soon,
        wanted: &|| true,
    };
    let mut alone = comms.join(seat()).unwrap();
    alone
        .all_to_all(&[1, 2], &mut [0; 2], 2, soon)
        .expect("alone it sends to itself");
    let fault = alone.all_to_all(&[1, 2], &mut [0; 2], 3, soon).unwrap_err();
    assert!(fault.why.contains("not 3"), "{fault}");
    let fault = alone.counted(&[vec![1]], &mut [vec![0]], soon).unwrap_err();
    assert!(fault.why.contains("failed before"), "{fault}");
    assert!(alone.finish(soon).is_err());
    drop(alone);
    let id = comms.new_id().unwrap();
    let fault = comms
        .join(Seat {
            id: &id,
            rank: 1,
            ..seat()
        })
        .unwrap_err();
    assert!(fault.why.contains("not below"), "{fault}");
    let given_up = comms.join(Seat {
        id: &id,
        ranks: 2,
        wanted: &|| false,
        ..seat()
    });
    let fault = given_up.unwrap_err();
    assert!(fault.why.contains("not wanted any more"), "{fault}");
}

#[test]
fn what_is_no_library_is_refused_by_name() {
    let missing = Library::open(Some(Path::new("/nonexistent/libnccl.so.2"))).unwrap_err();
    assert!(
        missing.to_string().contains("/nonexistent/libnccl.so.2"),
        "{missing}"
    );
    assert_eq!(missing.category(), "library");
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml");
    let text = Library::open(Some(Path::new(source))).unwrap_err();
    assert!(text.to_string().contains("Cargo.toml"), "{text}");
    // A library, but none of NCCL's.
    let other = Library::open(Some(Path::new("libc.so.6"))).unwrap_err();
    assert!(
        matches!(
            other,
            CommError::Symbol {
                symbol: "ncclGetVersion",
                ..
            }
        ),
        "{other}"
    );
    assert!(!other.is_retryable());
}

#[test]
fn an_old_library_is_refused_before_what_it_lacks_is_looked_for() {
    let old = Scripted::new(&["CODE=22703", "REDUCED"]);
    let error = Library::open(Some(&old.path)).unwrap_err();
    let CommError::Old { found, floor, .. } = &error else {
        panic!("{error:?}")
    };
    assert_eq!((found.to_string().as_str(), *floor), ("2.27.3", FLOOR));
    let reduced = Scripted::new(&["CODE=23002", "REDUCED"]);
    let error = Library::open(Some(&reduced.path)).unwrap_err();
    assert!(
        matches!(
            error,
            CommError::Symbol {
                symbol: "ncclAlltoAll",
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn versions_are_read_in_both_forms() {
    for (code, text) in [
        (2804, "2.8.4"),
        (20903, "2.9.3"),
        (22809, "2.28.9"),
        (23203, "2.32.3"),
    ] {
        assert_eq!(Version::of_code(code).to_string(), text);
    }
    assert!(Version::of_code(22800) >= FLOOR && Version::of_code(22799) < FLOOR);
}

#[test]
fn what_the_library_lacks_is_none() {
    let library = Scripted::new(&[]);
    let opened = library.open();
    let optional = opened.optional();
    assert!(optional.comm_revoke.is_none() && optional.window_register.is_none());
    assert!(!optional.has_comm_grow);
}

#[test]
fn an_orderly_end_is_finalize_then_destroy() {
    let scripted = Scripted::new(&["LOOKS=3"]);
    let library = scripted.open();
    let mut communicator = Communicator::join(&library, join(2, 0, LONG)).unwrap();
    assert_eq!((communicator.rank(), communicator.ranks()), (0, 2));
    all_to_all(&mut communicator).unwrap();
    communicator.settle(LONG).unwrap();
    communicator.check().unwrap();
    communicator.finalize(LONG).unwrap();
    let counts = ["finalizes", "destroys", "aborts"].map(|name| scripted.calls(name));
    assert_eq!(counts, [1, 1, 0]);
}

#[test]
fn who_never_comes_is_waited_for_until_the_deadline_and_then_the_rest_aborts() {
    let scripted = Scripted::new(&["LOOKS=-1"]);
    let library = scripted.open();
    let begun = Instant::now();
    let error = Communicator::join(&library, join(8, 3, SHORT)).unwrap_err();
    assert!(begun.elapsed() >= SHORT && begun.elapsed() < LONG);
    assert!(
        matches!(
            error,
            CommError::Deadline {
                rank: 3,
                epoch: EPOCH,
                ..
            }
        ),
        "{error}"
    );
    assert!(error.is_retryable());
    assert_eq!(scripted.calls("aborts"), 1);
}

#[test]
fn after_a_loss_nothing_more_is_taken() {
    let scripted = Scripted::new(&["LOST_AFTER=1"]);
    let library = scripted.open();
    let mut communicator = Communicator::join(&library, join(2, 1, LONG)).unwrap();
    all_to_all(&mut communicator).unwrap();
    let error = communicator.settle(LONG).unwrap_err();
    assert!(
        matches!(
            error,
            CommError::Call {
                code: 6,
                rank: 1,
                ..
            }
        ),
        "ncclRemoteError: {error}"
    );
    assert!(
        error.to_string().contains("a peer is gone"),
        "the library's words: {error}"
    );
    let after = all_to_all(&mut communicator).unwrap_err();
    assert!(matches!(after, CommError::Refused { .. }), "{after}");
    assert_eq!(scripted.calls("all_to_alls"), 1);
    communicator.abort().unwrap();
    assert_eq!(scripted.calls("aborts"), 1);
}

#[test]
fn dropping_aborts_once() {
    let scripted = Scripted::new(&[]);
    let library = scripted.open();
    drop(Communicator::join(&library, join(1, 0, LONG)).unwrap());
    assert_eq!(
        (scripted.calls("aborts"), scripted.calls("destroys")),
        (1, 0)
    );
}

/// An abort that never ends is left to its thread; neither `abort` nor a drop waits longer than it was told to.
#[test]
fn an_abort_that_hangs_is_leaked() {
    let scripted = Scripted::new(&["HANG"]);
    let library = scripted.open();
    let begun = Instant::now();
    let communicator = Communicator::join(&library, join(1, 0, LONG)).unwrap();
    let error = communicator.abort().unwrap_err();
    assert!(
        matches!(
            error,
            CommError::Deadline {
                call: "ncclCommAbort",
                ..
            }
        ),
        "{error}"
    );
    drop(Communicator::join(&library, join(1, 0, LONG)).unwrap());
    assert!(begun.elapsed() < LONG);
    assert_eq!(scripted.calls("aborts"), 2);
}

#[test]
fn groups_are_closed_whatever_happens_inside() {
    let scripted = Scripted::new(&[]);
    let library = scripted.open();
    let mut communicator = Communicator::join(&library, join(2, 0, LONG)).unwrap();
    let error = communicator
        .group(|communicator| {
            // SAFETY: the scripted library touches no memory.
            unsafe {
                communicator.send(std::ptr::null(), 0, Element::U8, 1, std::ptr::null_mut())?;
                communicator.recv(
                    std::ptr::null_mut(),
                    0,
                    Element::U8,
                    2,
                    std::ptr::null_mut(),
                )
            }
        })
        .unwrap_err();
    assert!(error.to_string().contains("no rank 2"), "{error}");
    assert_eq!((scripted.calls("sends"), scripted.calls("recvs")), (1, 0));
    assert_eq!(scripted.calls("open_groups"), 0);
}

#[test]
fn a_rank_that_is_none_is_refused() {
    let scripted = Scripted::new(&[]);
    let error = Communicator::join(&scripted.open(), join(2, 2, LONG)).unwrap_err();
    assert!(matches!(error, CommError::Refused { .. }), "{error}");
    assert_eq!(scripted.calls("joins"), 0);
}
