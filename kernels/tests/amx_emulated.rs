//! The AMX path as machine code, on processors that have no AMX as well.
//!
//! Where an instruction of AMX is unknown it raises SIGILL. The handler here decodes it from the bytes it stands in,
//! executes it on tiles in memory by Intel's definition, and lets the thread go on behind it. So the very instructions
//! that the crate was compiled to are run: their encodings, operands, configurations and order. What they compute is
//! compared with the unit in plain Rust, which shares no code with this one.
//!
//! Where the processor has AMX the same tests run on it, and no instruction is emulated.
#![cfg(all(target_arch = "x86_64", target_os = "linux"))]
#![expect(
    unsafe_code,
    reason = "a signal handler that goes on behind an instruction"
)]
#![expect(clippy::unwrap_used, reason = "a test ends at its first error")]

#[path = "amx_emulated/instruction.rs"]
mod instruction;
#[path = "amx_emulated/tiles.rs"]
mod tiles;

use std::cell::UnsafeCell;
use std::sync::Once;
use std::sync::atomic::{AtomicU64, Ordering};

use foregate_kernels::{
    Cpu, Dtype, ExpertFfn, ExpertGroup, MatMul, Matrix, Ops, Path, quantize,
};
use instruction::Instruction;
use tiles::TileFile;

thread_local! {
    /// The tiles of a thread. Without a destructor and made at compile time, so that a signal handler may use them.
    static TILES: UnsafeCell<TileFile> = const { UnsafeCell::new(TileFile::EMPTY) };
}

/// Instructions executed by the handler.
static EMULATED: AtomicU64 = AtomicU64::new(0);

/// Executes the instruction that raised the signal. One that is not of AMX, or that AMX would refuse, ends the process.
extern "C" fn on_unknown_instruction(
    _: libc::c_int,
    _: *mut libc::siginfo_t,
    context: *mut libc::c_void,
) {
    // SAFETY: the system passes the interrupted thread's context.
    let registers = unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    let at = registers[libc::REG_RIP as usize] as usize;
    // SAFETY: the thread was about to execute what stands there.
    let byte = |i: usize| unsafe { (at as *const u8).add(i).read() };
    let done = Instruction::decode(byte, registers).filter(|(instruction, _)| {
        // SAFETY: only this thread has this tile file, and the handler does not interrupt itself: it has no instruction
        // that is unknown.
        TILES.with(|tiles| unsafe { (*tiles.get()).execute(*instruction) })
    });
    match done {
        Some((_, length)) => {
            registers[libc::REG_RIP as usize] += length as i64;
            EMULATED.fetch_add(1, Ordering::Relaxed);
        }
        None => {
            const WHAT: &[u8] =
                b"an instruction that is not of AMX, or that AMX would refuse\n";
            // SAFETY: both may be called here. The instruction is executed again, and ends the process.
            unsafe {
                libc::write(libc::STDERR_FILENO, WHAT.as_ptr().cast(), WHAT.len());
                libc::signal(libc::SIGILL, libc::SIG_DFL);
            }
        }
    }
}

/// The AMX path, of the processor or emulated.
fn amx(threads: usize) -> Cpu {
    static INSTALLED: Once = Once::new();
    if Path::Amx.is_present() {
        return Cpu::with_path(Path::Amx, threads).unwrap();
    }
    INSTALLED.call_once(|| {
        assert!(
            is_x86_feature_detected!("fma"),
            "the emulation multiplies with FMA"
        );
        // SAFETY: a zero `sigaction` is a valid one; the handler has the signature that SA_SIGINFO asks for.
        let installed = unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = on_unknown_instruction as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO;
            libc::sigaction(libc::SIGILL, &raw const action, std::ptr::null_mut())
        };
        assert_eq!(installed, 0);
    });
    // SAFETY: the handler executes what the processor does not know.
    unsafe { Cpu::with_path_unchecked(Path::Amx, threads) }
}

/// Numbers from a seed, between -1 and 1.
fn numbers(seed: u64, count: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1_u64 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

fn weight(values: &[f32], n: usize, k: usize) -> Matrix {
    let bytes: Vec<u8> = values
        .iter()
        .flat_map(|v| v.to_bits().to_le_bytes()[2..].to_vec())
        .collect();
    Matrix::pack(Dtype::Bf16, n, k, &bytes).unwrap()
}

fn product(cpu: &Cpu, x: &[f32], w: &Matrix, bias: Option<&[f32]>) -> Vec<f32> {
    let rows = x.len() / w.k();
    let mut out = vec![f32::NAN; rows * w.n()];
    let op: MatMul<'_> = MatMul {
        x,
        rows,
        w,
        bias,
        out: &mut out,
    };
    cpu.matmul(op).unwrap();
    out
}

/// What is no number has no defined bits.
#[track_caller]
fn assert_same(want: &[f32], got: &[f32], what: &str) {
    assert_eq!(want.len(), got.len(), "{what}");
    for (i, (want, got)) in want.iter().zip(got).enumerate() {
        let same = want.to_bits() == got.to_bits() || want.is_nan() && got.is_nan();
        assert!(same, "{what}: element {i}: {want:e} and {got:e}");
    }
}

/// The processor executed all instructions, or the handler some, and this thread's tiles are given back.
fn assert_ran_and_released() {
    let emulated = EMULATED.load(Ordering::Relaxed);
    assert_eq!(emulated == 0, Path::Amx.is_present(), "{emulated} emulated");
    // SAFETY: no instruction of AMX is being executed by this thread.
    assert!(TILES.with(|tiles| unsafe { (*tiles.get()).is_released() }));
}

#[test]
fn products_have_the_bits_of_the_definition() {
    let judge = Cpu::with_tiles_in_software(1);
    for (i, (rows, n, k)) in [
        (1, 16, 32),
        (1, 1, 1),
        (1, 70, 33),
        (2, 64, 64),
        (5, 33, 31),
        (16, 48, 96),
        (17, 80, 34),
        (31, 20, 130),
        (32, 64, 64),
        (33, 100, 65),
        (70, 17, 7),
        (100, 130, 40),
    ]
    .into_iter()
    .enumerate()
    {
        let seed = i as u64;
        let (x, bias) = (numbers(seed, rows * k), numbers(seed + 100, n));
        let w = weight(&numbers(seed + 200, n * k), n, k);
        let want = product(&judge, &x, &w, Some(&bias));
        for threads in [1, 3] {
            let got = product(&amx(threads), &x, &w, Some(&bias));
            assert_same(
                &want,
                &got,
                &format!("{rows} x {n} x {k}, {threads} threads"),
            );
        }
    }
    assert_ran_and_released();
}

#[test]
fn codes_have_the_bits_of_the_definition() {
    let judge = Cpu::with_tiles_in_software(1);
    for (dtype, k) in [
        (Dtype::Int8, 270),
        (Dtype::Int4 { group: 64 }, 141),
        (Dtype::Int4 { group: 6 }, 20),
        (Dtype::Mxfp4, 100),
    ] {
        let (rows, n) = (21, 75);
        let x = numbers(500, rows * k);
        let canonical = quantize(dtype, n, k, &numbers(501, n * k)).unwrap();
        let w = Matrix::pack(dtype, n, k, &canonical).unwrap();
        for rows in [1, rows] {
            let x = &x[..rows * k];
            let want = product(&judge, x, &w, None);
            assert_same(&want, &product(&amx(2), x, &w, None), &format!("{dtype}"));
        }
    }
    assert_ran_and_released();
}

/// Infinities, what is no number, and what is so small that tiles take it for zero, in inputs, weights and sums.
#[test]
fn extremes_have_the_bits_of_the_definition() {
    let extremes = [
        f32::INFINITY,
        f32::NEG_INFINITY,
        f32::NAN,
        f32::MAX,
        f32::MIN_POSITIVE,
        -f32::MIN_POSITIVE,
        f32::MIN_POSITIVE / 2.0,
        -0.0,
        1.0e-20,
        -1.0e-20,
        3.0e38,
    ];
    let (rows, n, k) = (19, 35, 50);
    let judge = Cpu::with_tiles_in_software(1);
    for (i, extreme) in extremes.into_iter().enumerate() {
        let (mut x, mut w) = (numbers(i as u64, rows * k), numbers(50 + i as u64, n * k));
        // Some rows and outputs of nothing else, some with one.
        x[k..3 * k].fill(extreme);
        w[2 * k..4 * k].fill(extreme);
        x[10 * k + 7] = extreme;
        w[20 * k + 8] = extreme;
        // Products around 2⁻¹²⁶.
        x[12 * k..13 * k].fill(1.1e-19);
        w[9 * k..10 * k].iter_mut().for_each(|w| *w *= 1.1e-19);
        let w = weight(&w, n, k);
        let want = product(&judge, &x, &w, None);
        assert_same(
            &want,
            &product(&amx(1), &x, &w, None),
            &format!("{extreme:e}"),
        );
    }
    assert_ran_and_released();
}

#[test]
fn experts_have_the_bits_of_the_definition() {
    let (hidden, inner) = (45, 83);
    let matrices: Vec<[Matrix; 3]> = (0..3)
        .map(|i| {
            let values = numbers(300 + i, inner * hidden);
            [
                weight(&values, inner, hidden),
                weight(&values[..], inner, hidden),
                weight(&values, hidden, inner),
            ]
        })
        .collect();
    let rows: [&[u32]; 3] = [&[8], &(0..40).collect::<Vec<u32>>(), &[3, 3, 0, 39]];
    let mut groups = Vec::new();
    let mut out_offset = 0;
    for ([gate, up, down], rows) in matrices.iter().zip(rows) {
        groups.push(ExpertGroup {
            gate,
            up,
            down,
            rows,
            out_offset,
        });
        out_offset += rows.len();
    }
    let x = numbers(400, 40 * hidden);
    let run = |cpu: &Cpu| {
        let mut out = vec![f32::NAN; out_offset * hidden];
        let op: ExpertFfn<'_> = ExpertFfn {
            x: &x,
            hidden,
            groups: &groups,
            out: &mut out,
        };
        cpu.expert_ffn(op).unwrap();
        out
    };
    let want = run(&Cpu::with_tiles_in_software(1));
    for threads in [1, 2] {
        assert_same(&want, &run(&amx(threads)), &format!("{threads} threads"));
    }
    assert_ran_and_released();
}
