//! The instructions of AMX as bytes (Intel SDM, volume 2): all have a VEX prefix of three bytes, map 0F38, W0, 128 bits.

/// General registers in the order of their numbers in an instruction.
const REGISTERS: [libc::c_int; 16] = [
    libc::REG_RAX,
    libc::REG_RCX,
    libc::REG_RDX,
    libc::REG_RBX,
    libc::REG_RSP,
    libc::REG_RBP,
    libc::REG_RSI,
    libc::REG_RDI,
    libc::REG_R8,
    libc::REG_R9,
    libc::REG_R10,
    libc::REG_R11,
    libc::REG_R12,
    libc::REG_R13,
    libc::REG_R14,
    libc::REG_R15,
];

/// An instruction with its operands; addresses are computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Instruction {
    LoadConfig {
        from: usize,
    },
    Release,
    Zero {
        tile: u8,
    },
    Load {
        tile: u8,
        from: usize,
        stride: usize,
    },
    Store {
        tile: u8,
        to: usize,
        stride: usize,
    },
    MultiplyBf16 {
        sums: u8,
        a: u8,
        b: u8,
    },
}

/// An operand in memory: base with displacement, and index with scale.
struct Memory {
    base: usize,
    index: usize,
    has_sib: bool,
    length: usize,
}

impl Instruction {
    /// The instruction at `byte(0)` and its length; `None` when it is none of AMX.
    pub(crate) fn decode(
        byte: impl Fn(usize) -> u8,
        registers: &[i64; 23],
    ) -> Option<(Self, usize)> {
        let (first, second) = (byte(1), byte(2));
        if byte(0) != 0xc4 || first & 0x1f != 2 || second & 0x84 != 0 {
            return None;
        }
        // The extending bits are kept inverted.
        let [r, x, b] = [7, 6, 5].map(|bit| !first >> bit & 1);
        let (third_tile, prefix, modrm) = (!(second >> 3) & 15, second & 3, byte(4));
        let (mode, reg, rm) = (modrm >> 6, modrm >> 3 & 7 | r << 3, modrm & 7);
        let in_register = mode == 3;
        let memory = || Memory::decode(&byte, (mode, rm), (x, b), registers);
        let found = match (byte(3), prefix, in_register) {
            (0x49, 0, false) if reg == 0 && third_tile == 0 => {
                let memory = memory();
                let from = memory.base.wrapping_add(memory.index);
                (Self::LoadConfig { from }, memory.length)
            }
            (0x49, 0, true) if reg == 0 && rm == 0 && third_tile == 0 => (Self::Release, 5),
            (0x49, 3, true) if rm == 0 && third_tile == 0 => (Self::Zero { tile: reg }, 5),
            (0x4b, 2 | 3, false) if third_tile == 0 => {
                let memory = memory();
                // Without an index there is no stride, and the processor refuses.
                if !memory.has_sib {
                    return None;
                }
                let (at, stride, tile) = (memory.base, memory.index, reg);
                let found = if prefix == 3 {
                    Self::Load {
                        tile,
                        from: at,
                        stride,
                    }
                } else {
                    Self::Store {
                        tile,
                        to: at,
                        stride,
                    }
                };
                (found, memory.length)
            }
            (0x5c, 2, true) => {
                let (a, b) = (rm | b << 3, third_tile);
                (Self::MultiplyBf16 { sums: reg, a, b }, 5)
            }
            _ => return None,
        };
        Some(found)
    }
}

impl Memory {
    /// The operand behind the ModRM byte, and the length of the whole instruction.
    fn decode(
        byte: &impl Fn(usize) -> u8,
        (mode, rm): (u8, u8),
        (x, b): (u8, u8),
        registers: &[i64; 23],
    ) -> Self {
        let register = |number: u8| registers[REGISTERS[usize::from(number)] as usize] as usize;
        let has_sib = rm == 4;
        let sib = byte(5);
        let mut length = if has_sib { 6 } else { 5 };
        let base = if has_sib { sib & 7 } else { rm };
        let size = match (mode, base) {
            (0, 5) | (2, _) => 4,
            (1, _) => 1,
            _ => 0,
        };
        let offset = match size {
            1 => isize::from(byte(length) as i8),
            4 => i32::from_le_bytes([0, 1, 2, 3].map(|i| byte(length + i))) as isize,
            _ => 0,
        };
        length += size;
        let from = match (mode, base, has_sib) {
            (0, 5, true) => 0,
            (0, 5, false) => (registers[libc::REG_RIP as usize] as usize).wrapping_add(length),
            _ => register(base | b << 3),
        };
        let index = sib >> 3 & 7 | x << 3;
        let index = if has_sib && index != 4 {
            register(index) << (sib >> 6)
        } else {
            0
        };
        Self {
            base: from.wrapping_add_signed(offset),
            index,
            has_sib,
            length,
        }
    }
}

/// Bytes as two disassemblers (binutils, LLVM) read them.
#[test]
fn known_bytes_are_decoded() {
    let mut registers = [0_i64; 23];
    for (number, register) in REGISTERS.into_iter().enumerate() {
        registers[register as usize] = 0x1000 * (number as i64 + 1);
    }
    registers[libc::REG_RIP as usize] = 0x40_0000;
    let decode = |bytes: &[u8]| {
        let found = Instruction::decode(|i| bytes.get(i).copied().unwrap_or(0xcc), &registers);
        found.map(|(instruction, length)| {
            assert_eq!(length, bytes.len(), "{instruction:?}");
            instruction
        })
    };
    let load = |tile, from, stride| Some(Instruction::Load { tile, from, stride });
    // ldtilecfg [rdi]; [rsp+0x40]; [rip+0x10]; [r13+0x0]
    let config = |from| Some(Instruction::LoadConfig { from });
    assert_eq!(decode(&[0xc4, 0xe2, 0x78, 0x49, 0x07]), config(0x8000));
    assert_eq!(
        decode(&[0xc4, 0xe2, 0x78, 0x49, 0x44, 0x24, 0x40]),
        config(0x5040)
    );
    let relative = [0xc4, 0xe2, 0x78, 0x49, 0x05, 0x10, 0, 0, 0];
    assert_eq!(decode(&relative), config(0x40_0019));
    assert_eq!(decode(&[0xc4, 0xc2, 0x78, 0x49, 0x45, 0]), config(0xe000));
    // tilerelease; tilezero tmm5
    assert_eq!(
        decode(&[0xc4, 0xe2, 0x78, 0x49, 0xc0]),
        Some(Instruction::Release)
    );
    let zero = Some(Instruction::Zero { tile: 5 });
    assert_eq!(decode(&[0xc4, 0xe2, 0x7b, 0x49, 0xe8]), zero);
    // tileloadd tmm3, [rsi+rax*1]; tmm7, [r9+r10*1]; tmm4, [rbp+r12*2+0x100]
    assert_eq!(
        decode(&[0xc4, 0xe2, 0x7b, 0x4b, 0x1c, 0x06]),
        load(3, 0x7000, 0x1000)
    );
    assert_eq!(
        decode(&[0xc4, 0x82, 0x7b, 0x4b, 0x3c, 0x11]),
        load(7, 0xa000, 0xb000)
    );
    let far = [0xc4, 0xa2, 0x7b, 0x4b, 0xa4, 0x65, 0, 1, 0, 0];
    assert_eq!(decode(&far), load(4, 0x6100, 0x1_a000));
    // tilestored [rsi+rax*1], tmm2; tdpbf16ps tmm3, tmm5, tmm7
    let (tile, to, stride) = (2, 0x7000, 0x1000);
    let store = Some(Instruction::Store { tile, to, stride });
    assert_eq!(decode(&[0xc4, 0xe2, 0x7a, 0x4b, 0x14, 0x06]), store);
    let (sums, a, b) = (3, 5, 7);
    let multiply = Some(Instruction::MultiplyBf16 { sums, a, b });
    assert_eq!(decode(&[0xc4, 0xe2, 0x42, 0x5c, 0xdd]), multiply);
    // tileloadd without an index register byte; ud2; tdpbssd
    assert_eq!(decode(&[0xc4, 0xe2, 0x7b, 0x4b, 0x1e]), None);
    assert_eq!(decode(&[0x0f, 0x0b]), None);
    assert_eq!(decode(&[0xc4, 0xe2, 0x43, 0x5e, 0xc1]), None);
}
