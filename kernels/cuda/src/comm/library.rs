//! `libnccl.so.2`: found, opened, its version read, its functions taken by name.
//!
//! The signatures are those of `nccl.h` 2.28 (NVIDIA, BSD licence). Layouts of arguments do not change within NCCL 2; what
//! came after the floor is [`Optional`].

use std::ffi::{c_char, c_int, c_uint, c_void};
use std::fmt;
use std::mem::ManuallyDrop;
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::Arc;

use libloading::Library as Opened;

use super::{CommError, RawStream, UniqueId, text_at};

/// Where the library is looked for, in this order, by the loader's rules. Packages without development files have the
/// second name only; the first is a developer's own build.
pub const NAMES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];

/// The oldest version that is taken: the first with `ncclAlltoAll`.
pub const FLOOR: Version = Version {
    major: 2,
    minor: 28,
    patch: 0,
};

/// `ncclSuccess`.
pub(super) const SUCCESS: c_int = 0;
/// `ncclInProgress`.
pub(super) const IN_PROGRESS: c_int = 7;

/// A version of NCCL.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// First number.
    pub major: u32,
    /// Second number.
    pub minor: u32,
    /// Third number.
    pub patch: u32,
}

impl Version {
    /// Of `ncclGetVersion`'s number: `major * 10000 + minor * 100 + patch` from 2.9 on, `major * 1000 + …` before.
    #[must_use]
    pub const fn of_code(code: u32) -> Self {
        let thousands = if code < 10_000 { 1000 } else { 10_000 };
        Self {
            major: code / thousands,
            minor: code % thousands / 100,
            patch: code % 100,
        }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            major,
            minor,
            patch,
        } = self;
        write!(f, "{major}.{minor}.{patch}")
    }
}

/// A communicator's handle.
#[derive(Debug)]
pub(super) struct RawComm(pub(super) NonNull<c_void>);

// SAFETY: NCCL ties a communicator to a device, not to a thread; its calls on one are serialised by the owner.
unsafe impl Send for RawComm {}

impl RawComm {
    pub(super) const fn as_ptr(&self) -> *mut c_void {
        self.0.as_ptr()
    }

    /// For its last use. A method, so that a thread's closure takes the handle as a whole.
    pub(super) const fn into_ptr(self) -> *mut c_void {
        self.0.as_ptr()
    }
}

/// `ncclConfig_t` of 2.28. Newer libraries read `version` and take no more than that version had.
#[derive(Debug)]
#[repr(C)]
pub(super) struct Config {
    size: usize,
    magic: c_uint,
    version: c_uint,
    blocking: c_int,
    cga_cluster_size: c_int,
    min_ctas: c_int,
    max_ctas: c_int,
    net_name: *const c_char,
    split_share: c_int,
    traffic_class: c_int,
    comm_name: *const c_char,
    collnet_enable: c_int,
    cta_policy: c_int,
    shrink_share: c_int,
    nvls_ctas: c_int,
    n_channels_per_net_peer: c_int,
    nvlink_centric_sched: c_int,
}

impl Config {
    /// Nothing said but that no call shall block.
    pub(super) const fn non_blocking() -> Self {
        /// "Not said" for numbers.
        const UNSAID: c_int = c_int::MIN;
        Self {
            size: size_of::<Self>(),
            magic: 0xcafe_beef,
            version: FLOOR.major * 10_000 + FLOOR.minor * 100 + FLOOR.patch,
            blocking: 0,
            cga_cluster_size: UNSAID,
            min_ctas: UNSAID,
            max_ctas: UNSAID,
            net_name: std::ptr::null(),
            split_share: UNSAID,
            traffic_class: UNSAID,
            comm_name: std::ptr::null(),
            collnet_enable: UNSAID,
            cta_policy: UNSAID,
            shrink_share: UNSAID,
            nvls_ctas: UNSAID,
            n_channels_per_net_peer: UNSAID,
            nvlink_centric_sched: UNSAID,
        }
    }
}

type Comm = *mut c_void;
type Code = c_int;

/// The functions that every version from [`FLOOR`] on has.
#[derive(Debug)]
pub(super) struct Calls {
    pub(super) get_unique_id: unsafe extern "C" fn(*mut UniqueId) -> Code,
    pub(super) comm_init_rank_config:
        unsafe extern "C" fn(*mut Comm, c_int, UniqueId, c_int, *mut Config) -> Code,
    pub(super) comm_get_async_error: unsafe extern "C" fn(Comm, *mut Code) -> Code,
    pub(super) comm_finalize: unsafe extern "C" fn(Comm) -> Code,
    pub(super) comm_destroy: unsafe extern "C" fn(Comm) -> Code,
    pub(super) comm_abort: unsafe extern "C" fn(Comm) -> Code,
    pub(super) group_start: unsafe extern "C" fn() -> Code,
    pub(super) group_end: unsafe extern "C" fn() -> Code,
    pub(super) send:
        unsafe extern "C" fn(*const c_void, usize, c_int, c_int, Comm, RawStream) -> Code,
    pub(super) recv:
        unsafe extern "C" fn(*mut c_void, usize, c_int, c_int, Comm, RawStream) -> Code,
    pub(super) all_to_all:
        unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, Comm, RawStream) -> Code,
    pub(super) all_reduce: unsafe extern "C" fn(
        *const c_void,
        *mut c_void,
        usize,
        c_int,
        c_int,
        Comm,
        RawStream,
    ) -> Code,
    get_error_string: unsafe extern "C" fn(Code) -> *const c_char,
    get_last_error: unsafe extern "C" fn(Comm) -> *const c_char,
}

/// What later versions, or only some builds, have. `None`: the library at hand does not.
#[derive(Debug)]
pub struct Optional {
    /// `ncclCommRevoke`: stops a communicator's operations and keeps it.
    pub comm_revoke: Option<unsafe extern "C" fn(*mut c_void, c_int) -> c_int>,
    /// `ncclCommShrink`: a communicator without some of its ranks.
    pub comm_shrink: Option<
        unsafe extern "C" fn(
            *mut c_void,
            *mut c_int,
            c_int,
            *mut *mut c_void,
            *mut c_void,
            c_int,
        ) -> c_int,
    >,
    /// `ncclMemAlloc`: memory that can be registered as a window.
    pub mem_alloc: Option<unsafe extern "C" fn(*mut *mut c_void, usize) -> c_int>,
    /// `ncclMemFree`.
    pub mem_free: Option<unsafe extern "C" fn(*mut c_void) -> c_int>,
    /// `ncclCommWindowRegister`: memory that peers reach directly.
    pub window_register: Option<
        unsafe extern "C" fn(*mut c_void, *mut c_void, usize, *mut *mut c_void, c_int) -> c_int,
    >,
    /// `ncclCommWindowDeregister`.
    pub window_deregister: Option<unsafe extern "C" fn(*mut c_void, *mut c_void) -> c_int>,
    /// Whether there is `ncclCommGrow`, which came with 2.29.
    pub has_comm_grow: bool,
}

/// An opened NCCL. It stays in the process for good: NCCL starts threads of its own (the first unique id does), and code that
/// is taken away from under a thread is a crash.
#[derive(Debug)]
pub struct Library {
    path: PathBuf,
    version: Version,
    pub(super) calls: Calls,
    optional: Optional,
}

impl Library {
    /// Opens the library at `path`, or without one the first of [`NAMES`] that the loader finds.
    ///
    /// # Errors
    /// None can be opened, it is older than [`FLOOR`], or it lacks what that has.
    pub fn open(path: Option<&Path>) -> Result<Arc<Self>, CommError> {
        let tried: Vec<PathBuf> = match path {
            Some(path) => vec![path.to_owned()],
            None => NAMES.map(PathBuf::from).to_vec(),
        };
        let mut why = String::new();
        for path in &tried {
            // SAFETY: the initialisers of NCCL are trusted: whoever may name a library here may replace the program.
            match unsafe { Opened::new(path) } {
                Ok(opened) => {
                    return Self::of(path.clone(), &ManuallyDrop::new(opened)).map(Arc::new);
                }
                Err(error) if why.is_empty() => why = error.to_string(),
                Err(_) => {}
            }
        }
        let tried: Vec<String> = tried
            .iter()
            .map(|path| path.display().to_string())
            .collect();
        Err(CommError::Library {
            tried: tried.join(", "),
            why,
        })
    }

    fn of(path: PathBuf, opened: &Opened) -> Result<Self, CommError> {
        let from = Symbols {
            path: &path,
            opened,
        };
        let get_version: unsafe extern "C" fn(*mut c_int) -> Code =
            from.must("ncclGetVersion")?;
        let get_error_string = from.must("ncclGetErrorString")?;
        let mut code = 0;
        // SAFETY: `code` outlives the call.
        let result = unsafe { get_version(&raw mut code) };
        if result != SUCCESS {
            return Err(early("ncclGetVersion", result, get_error_string));
        }
        let version = Version::of_code(u32::try_from(code).unwrap_or_default());
        // Before the other symbols: an old library is old, whatever it lacks.
        if version < FLOOR {
            return Err(CommError::Old {
                path,
                found: version,
                floor: FLOOR,
            });
        }
        let calls = Calls {
            get_unique_id: from.must("ncclGetUniqueId")?,
            comm_init_rank_config: from.must("ncclCommInitRankConfig")?,
            comm_get_async_error: from.must("ncclCommGetAsyncError")?,
            comm_finalize: from.must("ncclCommFinalize")?,
            comm_destroy: from.must("ncclCommDestroy")?,
            comm_abort: from.must("ncclCommAbort")?,
            group_start: from.must("ncclGroupStart")?,
            group_end: from.must("ncclGroupEnd")?,
            send: from.must("ncclSend")?,
            recv: from.must("ncclRecv")?,
            all_to_all: from.must("ncclAlltoAll")?,
            all_reduce: from.must("ncclAllReduce")?,
            get_error_string,
            get_last_error: from.must("ncclGetLastError")?,
        };
        let grow: Option<unsafe extern "C" fn()> = from.may("ncclCommGrow");
        let optional = Optional {
            comm_revoke: from.may("ncclCommRevoke"),
            comm_shrink: from.may("ncclCommShrink"),
            mem_alloc: from.may("ncclMemAlloc"),
            mem_free: from.may("ncclMemFree"),
            window_register: from.may("ncclCommWindowRegister"),
            window_deregister: from.may("ncclCommWindowDeregister"),
            has_comm_grow: grow.is_some(),
        };
        Ok(Self {
            path,
            version,
            calls,
            optional,
        })
    }

    /// The name or path that it was opened by.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its version.
    #[must_use]
    pub const fn version(&self) -> Version {
        self.version
    }

    /// What it has beside the floor.
    #[must_use]
    pub const fn optional(&self) -> &Optional {
        &self.optional
    }

    /// A new unique id: for one rank, which tells the others. Opens a listening socket in this process, on the interface
    /// that `NCCL_SOCKET_IFNAME` names or NCCL chooses, and serves there for the process's life.
    ///
    /// # Errors
    /// What NCCL says, for example that there is no network interface.
    pub fn unique_id(&self) -> Result<UniqueId, CommError> {
        let mut id = UniqueId([0; super::ID_BYTES]);
        // SAFETY: `id` outlives the call and has the size that `nccl.h` gives.
        let code = unsafe { (self.calls.get_unique_id)(&raw mut id) };
        if code == SUCCESS {
            return Ok(id);
        }
        Err(early("ncclGetUniqueId", code, self.calls.get_error_string))
    }

    /// NCCL's words for a code, and what it last said in detail.
    pub(super) fn text(&self, code: c_int, comm: Comm) -> String {
        // SAFETY: NCCL's texts are constants, or stay until the next error of this communicator.
        let word = unsafe { text_at((self.calls.get_error_string)(code)) };
        // SAFETY: as above; null is a communicator that NCCL accepts here.
        let detail = unsafe { text_at((self.calls.get_last_error)(comm)) };
        let word = word.unwrap_or_else(|| "no text".to_owned());
        match detail {
            // It repeats itself over lines; one line is what a log has.
            Some(detail) => format!("{word} ({})", detail.replace('\n', "; ")),
            None => word,
        }
    }
}

fn early(
    call: &'static str,
    code: c_int,
    text: unsafe extern "C" fn(Code) -> *const c_char,
) -> CommError {
    // SAFETY: NCCL's texts are constants.
    let text = unsafe { text_at(text(code)) };
    CommError::Early {
        call,
        code,
        text: text.unwrap_or_else(|| "no text".to_owned()),
    }
}

/// Takes functions by name.
struct Symbols<'a> {
    path: &'a Path,
    opened: &'a Opened,
}

impl Symbols<'_> {
    fn must<F: Copy>(&self, symbol: &'static str) -> Result<F, CommError> {
        self.may(symbol).ok_or_else(|| CommError::Symbol {
            path: self.path.to_owned(),
            symbol,
        })
    }

    fn may<F: Copy>(&self, symbol: &str) -> Option<F> {
        // SAFETY: the types stand beside the names above, as in `nccl.h`; the copy does not outlive the library, which
        // the owner of the copies keeps.
        unsafe { self.opened.get::<F>(symbol.as_bytes()) }
            .ok()
            .map(|found| *found)
    }
}
