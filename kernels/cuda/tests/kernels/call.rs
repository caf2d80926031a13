//! One launch: its memory, its arguments, and what it left behind.

use std::ffi::c_void;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::Path;

use foregate_cuda_emulate::{Fault, Order, kernels, launch_in};

/// Numbers that lie in device memory.
pub(crate) trait Number: Copy {
    fn bytes(self) -> Vec<u8>;
    fn of(bytes: &[u8]) -> Self;
}

macro_rules! number {
    ($($t:ty),*) => {$(
        impl Number for $t {
            fn bytes(self) -> Vec<u8> { self.to_le_bytes().to_vec() }
            fn of(bytes: &[u8]) -> Self { Self::from_le_bytes(bytes.try_into().unwrap()) }
        }
    )*};
}
number!(u8, u16, u32, u64, f32);

pub(crate) fn bytes_of<T: Number>(values: &[T]) -> Vec<u8> {
    values.iter().flat_map(|v| v.bytes()).collect()
}

/// A buffer of a [`Call`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct Id(usize);

enum Argument {
    Value(Vec<u8>),
    Buffer(Id),
    Null,
}

/// Memory aligned as a card's.
#[derive(Clone)]
struct Buffer {
    words: Vec<u128>,
    size: usize,
    /// Buffers whose addresses it holds.
    links: Vec<Id>,
}

impl Buffer {
    fn of(bytes: &[u8]) -> Self {
        let mut words = vec![0_u128; bytes.len().div_ceil(16).max(1)];
        for (word, chunk) in words.iter_mut().zip(bytes.chunks(16)) {
            let mut whole = [0; 16];
            whole[..chunk.len()].copy_from_slice(chunk);
            *word = u128::from_le_bytes(whole);
        }
        Self {
            words,
            size: bytes.len(),
            links: Vec::new(),
        }
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes: Vec<u8> = self.words.iter().flat_map(|w| w.to_le_bytes()).collect();
        bytes.truncate(self.size);
        bytes
    }
}

/// A kernel with its arguments, in the order in which they were given.
pub(crate) struct Call {
    kernel: String,
    buffers: Vec<Buffer>,
    arguments: Vec<Argument>,
}

impl Call {
    pub(crate) fn new(kernel: &str) -> Self {
        Self {
            kernel: kernel.to_owned(),
            buffers: Vec::new(),
            arguments: Vec::new(),
        }
    }

    fn buffer(&mut self, bytes: &[u8]) -> Id {
        self.buffers.push(Buffer::of(bytes));
        Id(self.buffers.len() - 1)
    }

    /// The next argument is a value.
    pub(crate) fn value<T: Number>(&mut self, value: T) -> &mut Self {
        self.arguments.push(Argument::Value(value.bytes()));
        self
    }

    /// The next argument is the address of these numbers.
    pub(crate) fn memory<T: Number>(&mut self, values: &[T]) -> Id {
        let id = self.buffer(&bytes_of(values));
        self.arguments.push(Argument::Buffer(id));
        id
    }

    /// The next argument is the address of `count` numbers that are NaN, or as integers all ones.
    pub(crate) fn output<T: Number>(&mut self, count: usize) -> Id {
        let id = self.buffer(&vec![0xff; count * size_of::<T>()]);
        self.arguments.push(Argument::Buffer(id));
        id
    }

    /// The next argument is the address of an address for each of these.
    pub(crate) fn addresses(&mut self, each: &[Vec<u8>]) {
        let links = each.iter().map(|bytes| self.buffer(bytes)).collect();
        let id = self.buffer(&vec![0; each.len() * 8]);
        self.buffers[id.0].links = links;
        self.arguments.push(Argument::Buffer(id));
    }

    /// The next argument is null.
    pub(crate) fn null(&mut self) {
        self.arguments.push(Argument::Null);
    }

    pub(crate) fn read<T: Number>(&self, id: Id) -> Vec<T> {
        let bytes = self.buffers[id.0].bytes();
        bytes.chunks_exact(size_of::<T>()).map(T::of).collect()
    }

    /// Launches, in both orders of threads, and records it if that is wanted.
    pub(crate) fn run(&mut self, grid: [u32; 3]) {
        let before = self.buffers.clone();
        self.once(Order::Descending, grid).unwrap();
        let other = std::mem::replace(&mut self.buffers, before.clone());
        self.once(Order::Ascending, grid).unwrap();
        for (one, other) in self.buffers.iter().zip(&other) {
            let same = one.words == other.words || !one.links.is_empty();
            assert!(same, "{}: the order of threads shows", self.kernel);
        }
        if let Some(folder) = std::env::var_os("FOREGATE_CUDA_RECORD") {
            self.record(Path::new(&folder), grid, &before);
        }
    }

    /// Records it without a launch, if that is wanted: what a sanitizer is to find.
    pub(crate) fn record_only(&self, grid: [u32; 3]) {
        if let Some(folder) = std::env::var_os("FOREGATE_CUDA_RECORD") {
            self.record(Path::new(&folder), grid, &self.buffers);
        }
    }

    /// Launches once.
    pub(crate) fn once(&mut self, order: Order, grid: [u32; 3]) -> Result<(), Fault> {
        let addresses: Vec<u64> = self
            .buffers
            .iter_mut()
            .map(|b| b.words.as_mut_ptr() as u64)
            .collect();
        for buffer in &mut self.buffers {
            for (i, link) in buffer.links.iter().enumerate() {
                let shift = i % 2 * 64;
                buffer.words[i / 2] &= !(u128::from(u64::MAX) << shift);
                buffer.words[i / 2] |= u128::from(addresses[link.0]) << shift;
            }
        }
        // Each in 16 aligned bytes of its own.
        let mut values: Vec<u128> = Vec::new();
        for argument in &self.arguments {
            values.push(match argument {
                Argument::Value(bytes) => Buffer::of(bytes).words[0],
                Argument::Buffer(id) => u128::from(addresses[id.0]),
                Argument::Null => 0,
            });
        }
        let pointers: Vec<*mut c_void> = values
            .iter_mut()
            .map(|v| std::ptr::from_mut(v).cast())
            .collect();
        let threads = kernels()
            .into_iter()
            .find(|k| k.name == self.kernel)
            .map_or(1, |k| k.threads);
        // SAFETY: the test gives the arguments of the table, with memory of the sizes that the table says.
        unsafe { launch_in(order, &self.kernel, grid, [threads, 1, 1], 0, &pointers) }
    }

    /// Launches of up to this many bytes are recorded.
    const SMALL: usize = 1 << 20;

    fn record(&self, folder: &Path, grid: [u32; 3], before: &[Buffer]) {
        if before.iter().map(|b| b.size).sum::<usize>() > Self::SMALL {
            return;
        }
        let mut out = Vec::new();
        let number = |out: &mut Vec<u8>, n: usize| out.extend((n as u64).to_le_bytes());
        let run = |out: &mut Vec<u8>, bytes: &[u8]| {
            number(out, bytes.len());
            out.extend(bytes);
        };
        run(&mut out, self.kernel.as_bytes());
        for size in grid {
            number(&mut out, size as usize);
        }
        number(&mut out, before.len());
        for (before, after) in before.iter().zip(&self.buffers) {
            run(&mut out, &before.bytes());
            run(&mut out, &after.bytes());
            number(&mut out, before.links.len());
            for link in &before.links {
                number(&mut out, link.0);
            }
        }
        number(&mut out, self.arguments.len());
        for argument in &self.arguments {
            match argument {
                Argument::Value(bytes) => {
                    out.push(0);
                    run(&mut out, bytes);
                }
                Argument::Buffer(id) => {
                    out.push(1);
                    number(&mut out, id.0);
                }
                Argument::Null => out.push(2),
            }
        }
        let mut hash = DefaultHasher::new();
        out.hash(&mut hash);
        fs::create_dir_all(folder).unwrap();
        let name = format!("{}.{:016x}.case", self.kernel, hash.finish());
        fs::write(folder.join(name), out).unwrap();
    }
}
