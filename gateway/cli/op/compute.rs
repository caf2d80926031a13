//! The operations by name, each with the tensors and numbers that it wants. Shapes are those of `kernels/src/ops.rs`.

use foregate_kernels::{
    Add, Array, Attention, Clamp, Combine, Cpu, Dtype, Embed, Executor, ExpertFfn, ExpertGroup,
    ExpertLayer, ExpertParts, Gate, Gather, KvDtype, KvShape, KvWrite, MatMul, Matrix, Norm,
    Ops as _, PageMap, Placed, RmsNorm, Rope, RopeTable, SigmoidScale, StepRows,
};

use super::tensors::{Tensors, Values};

/// Runs one operation.
pub(super) fn run(
    name: &str,
    executor: &dyn Executor,
    cpu: Option<&Cpu>,
    inputs: &Tensors,
) -> Result<Tensors, String> {
    let bench = Bench { executor, inputs };
    match name {
        "matmul" => bench.matmul(),
        "embed" => bench.embed(),
        "rms_norm" => bench.rms_norm(),
        "rope" => bench.rope(),
        "attention" => bench.attention(),
        "gate" => bench.gate(),
        "expert_layer" => match cpu {
            Some(cpu) => bench.expert_layer_here(cpu),
            None => bench.expert_layer(),
        },
        "add" => bench.add(),
        "sigmoid_scale" => bench.sigmoid_scale(),
        "clamp" => bench.clamp(),
        "gather" => bench.gather(),
        _ => Err("no such operation".to_owned()),
    }
}

struct Bench<'a> {
    executor: &'a dyn Executor,
    inputs: &'a Tensors,
}

/// Experts of a layer, packed.
struct Experts {
    gate: Vec<Matrix>,
    up: Vec<Matrix>,
    down: Vec<Matrix>,
}

fn said(error: impl std::fmt::Display) -> String {
    error.to_string()
}

impl Bench<'_> {
    fn array(&self, name: &str) -> Result<Array<f32>, String> {
        Array::of(self.executor, "an input", self.inputs.floats(name)?).map_err(said)
    }

    /// Values that are none, to be overwritten.
    fn poisoned(&self, count: usize) -> Result<Array<f32>, String> {
        Array::of(self.executor, "an output", vec![f32::NAN; count]).map_err(said)
    }

    fn floats(array: &Array<f32>) -> Result<Values, String> {
        let mut values = vec![0.0; array.extent()];
        array.view().read(&mut values).map_err(said)?;
        Ok(Values::F32(values))
    }

    /// Matrices of the last two dimensions of a weight. Codes are rows of canonical bytes: numbers `NAME.n` and `NAME.k` are the
    /// sizes of each, `NAME.format` their format.
    fn matrices(&self, name: &str) -> Result<Vec<Matrix>, String> {
        let (shape, values) = self.inputs.get(name)?;
        let [.., mut n, mut k] = *shape else {
            return Err(format!("`{name}` has fewer than two dimensions"));
        };
        let bytes: Vec<u8>;
        let mut count = shape.iter().rev().skip(2).product::<usize>();
        let (dtype, bytes): (_, &[u8]) = match values {
            Values::F32(values) => {
                bytes = values
                    .iter()
                    .flat_map(|value| value.to_le_bytes())
                    .collect();
                (Dtype::F32, &bytes)
            }
            Values::Bf16(bytes) => (Dtype::Bf16, bytes),
            Values::F16(bytes) => (Dtype::F16, bytes),
            Values::Codes(bytes) => {
                count = n;
                n = self.inputs.number(&format!("{name}.n"))?;
                k = self.inputs.number(&format!("{name}.k"))?;
                (self.coded(&format!("{name}.format"))?, bytes)
            }
            Values::U32(_) => return Err(format!("`{name}` is no weight")),
        };
        let size = bytes.len() / count.max(1);
        let pack = |bytes| self.executor.matrix(dtype, n, k, bytes).map_err(said);
        bytes.chunks_exact(size.max(1)).map(pack).collect()
    }

    /// A format of codes: `int8`, `int4 GROUP`, `fp8 ROWS COLUMNS` or `mxfp4`.
    fn coded(&self, name: &str) -> Result<Dtype, String> {
        let text = self.inputs.text(name).unwrap_or_default();
        let words: Vec<&str> = text.split(' ').collect();
        let number = |word: &str| {
            word.parse::<usize>()
                .map_err(|_| format!("`{name}` is {text}"))
        };
        match words[..] {
            ["int8"] => Ok(Dtype::Int8),
            ["int4", group] => Ok(Dtype::Int4 {
                group: number(group)?,
            }),
            ["fp8", rows, columns] => Ok(Dtype::Fp8 {
                block_n: number(rows)?,
                block_k: number(columns)?,
            }),
            ["mxfp4"] => Ok(Dtype::Mxfp4),
            _ => Err(format!(
                "`{name}` is {text:?}: int8, int4 GROUP, fp8 ROWS COLUMNS or mxfp4"
            )),
        }
    }

    fn matrix(&self, name: &str) -> Result<Matrix, String> {
        let mut all = self.matrices(name)?;
        match all.len() {
            1 => Ok(all.remove(0)),
            count => Err(format!("`{name}` is {count} matrices, not one")),
        }
    }

    /// `x`, `w`, perhaps `bias` → `out`.
    fn matmul(&self) -> Result<Tensors, String> {
        let (rows, _, _) = self.inputs.rows("x")?;
        let (x, w) = (self.array("x")?, self.matrix("w")?);
        let bias = self
            .inputs
            .has("bias")
            .then(|| self.array("bias"))
            .transpose()?;
        let mut out = self.poisoned(rows * w.n())?;
        let op = MatMul {
            x: x.view(),
            rows,
            w: &w,
            bias: bias.as_ref().map(Array::view),
            out: out.view_mut(),
        };
        self.executor.matmul(op).map_err(said)?;
        Ok(Tensors::default().with("out", &[rows, w.n()], Self::floats(&out)?))
    }

    /// `table`, `ids` → `out`.
    fn embed(&self) -> Result<Tensors, String> {
        let (table, ids) = (self.matrix("table")?, self.inputs.integers("ids")?);
        let mut out = self.poisoned(ids.len() * table.k())?;
        let op = Embed {
            table: &table,
            ids,
            out: out.view_mut(),
        };
        self.executor.embed(op).map_err(said)?;
        Ok(Tensors::default().with("out", &[ids.len(), table.k()], Self::floats(&out)?))
    }

    /// `x`, `weight`, perhaps `add`, number `eps` → `out`, `x`.
    fn rms_norm(&self) -> Result<Tensors, String> {
        let (rows, width, _) = self.inputs.rows("x")?;
        let (mut x, weight) = (self.array("x")?, self.array("weight")?);
        let add = self
            .inputs
            .has("add")
            .then(|| self.array("add"))
            .transpose()?;
        let mut out = self.poisoned(rows * width)?;
        let op = RmsNorm {
            x: x.view_mut(),
            add: add.as_ref().map(Array::view),
            rows,
            width,
            weight: weight.view(),
            eps: self.inputs.number("eps")?,
            out: out.view_mut(),
        };
        self.executor.rms_norm(op).map_err(said)?;
        let (out, x) = (Self::floats(&out)?, Self::floats(&x)?);
        let outputs = Tensors::default().with("out", &[rows, width], out);
        Ok(outputs.with("x", &[rows, width], x))
    }

    /// `x`, `positions`, `inv_freq`, perhaps `norm`; numbers `heads`, `head_dim`, with a norm `eps` → `x`.
    fn rope(&self) -> Result<Tensors, String> {
        let (rows, width, _) = self.inputs.rows("x")?;
        let (heads, head_dim) = (
            self.inputs.number("heads")?,
            self.inputs.number("head_dim")?,
        );
        let positions = self.inputs.integers("positions")?;
        let table = RopeTable::new(&self.inputs.floats("inv_freq")?, positions);
        let mut x = self.array("x")?;
        let weight = self
            .inputs
            .has("norm")
            .then(|| self.array("norm"))
            .transpose()?;
        let norm = match &weight {
            Some(weight) => Some(Norm {
                weight: weight.view(),
                eps: self.inputs.number("eps")?,
            }),
            None => None,
        };
        let nowhere = vec![0; rows];
        let steps = StepRows {
            positions,
            pages: PageMap {
                sequence_of_row: &nowhere,
                tables: &[&[0]],
            },
            angles: &table,
            group: 1,
        };
        let mut placed = Placed::default();
        self.executor.place(steps, &mut placed).map_err(said)?;
        let op = Rope {
            x: x.view_mut(),
            rows,
            heads,
            head_dim,
            norm,
            clip: None,
            table: &table,
        };
        self.executor.rope(op, &placed).map_err(said)?;
        Ok(Tensors::default().with("x", &[rows, width], Self::floats(&x)?))
    }

    /// `k` and `v` of all positions of all sequences, `lengths`, `tables`; `q` of some rows, `sequence_of_row`, `positions`;
    /// numbers `heads`, `kv_heads`, `head_dim`, `page_tokens`, `pages`, `scale`, `kv` (F32, BF16) → `out`.
    fn attention(&self) -> Result<Tensors, String> {
        let number = |name: &str| self.inputs.number::<usize>(name);
        let (heads, kv_heads, head_dim) =
            (number("heads")?, number("kv_heads")?, number("head_dim")?);
        let dtype = match self.inputs.text("kv") {
            Some("F32") => KvDtype::F32,
            Some("BF16") => KvDtype::Bf16,
            other => return Err(format!("`kv` is {other:?}: F32 or BF16")),
        };
        let shape = KvShape {
            layers: 1,
            pages: number("pages")?,
            page_tokens: number("page_tokens")?,
            kv_heads,
            head_dim,
            dtype,
        };
        let mut kv = self.executor.kv_cache(shape).map_err(said)?;
        let (table_shape, _) = self.inputs.get("tables")?;
        let stride = table_shape.last().copied().unwrap_or(1).max(1);
        let tables: Vec<&[u32]> = self
            .inputs
            .integers("tables")?
            .chunks_exact(stride)
            .collect();
        let group = heads / kv_heads.max(1);
        self.write_kv(&mut kv, &tables, group)?;
        let (rows, width, _) = self.inputs.rows("q")?;
        let (positions, of_row) = (
            self.inputs.integers("positions")?,
            self.inputs.integers("sequence_of_row")?,
        );
        let pages = PageMap {
            sequence_of_row: of_row,
            tables: &tables,
        };
        let placed = self.placed(positions, pages, (head_dim, group))?;
        let (q, mut out) = (self.array("q")?, self.poisoned(rows * width)?);
        let op = Attention {
            q: q.view(),
            heads,
            scale: self.inputs.number("scale")?,
            positions,
            pages,
            kv: &kv,
            layer: 0,
            out: out.view_mut(),
        };
        self.executor.attention(op, &placed).map_err(said)?;
        Ok(Tensors::default().with("out", &[rows, width], Self::floats(&out)?))
    }

    /// Stores keys and values of all positions.
    fn write_kv(
        &self,
        kv: &mut foregate_kernels::KvCache,
        tables: &[&[u32]],
        group: usize,
    ) -> Result<(), String> {
        let lengths = self.inputs.integers("lengths")?;
        let each = || (0_u32..).zip(lengths);
        let of_row: Vec<u32> = each()
            .flat_map(|(sequence, length)| std::iter::repeat_n(sequence, *length as usize))
            .collect();
        let positions: Vec<u32> = each().flat_map(|(_, length)| 0..*length).collect();
        let pages = PageMap {
            sequence_of_row: &of_row,
            tables,
        };
        let head_dim = self.inputs.number("head_dim")?;
        let placed = self.placed(&positions, pages, (head_dim, group))?;
        let (k, v) = (self.array("k")?, self.array("v")?);
        let op = KvWrite {
            k: k.view(),
            v: v.view(),
            positions: &positions,
            pages,
            kv,
            layer: 0,
        };
        self.executor.kv_write(op, &placed).map_err(said)
    }

    fn placed(
        &self,
        positions: &[u32],
        pages: PageMap<'_>,
        (head_dim, group): (usize, usize),
    ) -> Result<Placed, String> {
        // No angle is asked for; the table has its form.
        let angles = RopeTable::new(&vec![1.0; head_dim / 2], positions);
        let steps = StepRows {
            positions,
            pages,
            angles: &angles,
            group,
        };
        let mut placed = Placed::default();
        self.executor.place(steps, &mut placed).map_err(said)?;
        Ok(placed)
    }

    /// `logits`; numbers `top_k`, `normalise` (0, 1) → `experts`, `weights`.
    fn gate(&self) -> Result<Tensors, String> {
        let (rows, experts, _) = self.inputs.rows("logits")?;
        let (logits, top_k) = (self.array("logits")?, self.inputs.number("top_k")?);
        let nothing = vec![u32::MAX; rows * top_k];
        let mut chosen = Array::of(self.executor, "an output", nothing).map_err(said)?;
        let mut weights = self.poisoned(rows * top_k)?;
        let op = Gate {
            logits: logits.view(),
            rows,
            experts,
            top_k,
            normalise: self.inputs.number::<u8>("normalise")? == 1,
            out_experts: chosen.view_mut(),
            out_weights: weights.view_mut(),
        };
        self.executor.gate(op).map_err(said)?;
        let mut ids = vec![0; rows * top_k];
        chosen.view().read(&mut ids).map_err(said)?;
        let shape = [rows, top_k];
        let outputs = Tensors::default().with("experts", &shape, Values::U32(ids));
        Ok(outputs.with("weights", &shape, Self::floats(&weights)?))
    }

    fn experts(&self) -> Result<Experts, String> {
        let experts = Experts {
            gate: self.matrices("gate")?,
            up: self.matrices("up")?,
            down: self.matrices("down")?,
        };
        if experts.gate.len() != experts.up.len() || experts.gate.len() != experts.down.len() {
            return Err("gate, up and down are of different numbers of experts".to_owned());
        }
        Ok(experts)
    }

    /// `x`, `experts`, `weights`, `gate`, `up`, `down` → `out`; on a device, in one call.
    fn expert_layer(&self) -> Result<Tensors, String> {
        let (rows, hidden, _) = self.inputs.rows("x")?;
        let experts = self.experts()?;
        let parts = |((gate, up), down)| ExpertParts { gate, up, down };
        let parts: Vec<ExpertParts<'_>> = experts
            .gate
            .iter()
            .zip(&experts.up)
            .zip(&experts.down)
            .map(parts)
            .collect();
        let table = self.executor.expert_table(&parts).map_err(said)?;
        let chosen = self.inputs.integers("experts")?.to_vec();
        let top_k = chosen.len() / rows.max(1);
        if let Some(wrong) = chosen
            .iter()
            .find(|expert| **expert as usize >= parts.len())
        {
            return Err(format!("there is no expert {wrong}"));
        }
        let chosen = Array::of(self.executor, "an input", chosen).map_err(said)?;
        let (x, weights) = (self.array("x")?, self.array("weights")?);
        let mut out = self.poisoned(rows * hidden)?;
        let op = ExpertLayer {
            x: x.view(),
            rows,
            experts: chosen.view(),
            weights: weights.view(),
            top_k,
            table: &table,
            out: out.view_mut(),
        };
        self.executor.expert_layer(op).map_err(said)?;
        Ok(Tensors::default().with("out", &[rows, hidden], Self::floats(&out)?))
    }

    /// The same on the processor, which goes expert by expert.
    fn expert_layer_here(&self, cpu: &Cpu) -> Result<Tensors, String> {
        let (rows, hidden, x) = self.inputs.rows("x")?;
        let experts = self.experts()?;
        let chosen = self.inputs.integers("experts")?;
        let (weights, top_k) = (self.inputs.floats("weights")?, chosen.len() / rows.max(1));
        let mut results = vec![f32::NAN; chosen.len() * hidden];
        let mut place = vec![0; chosen.len()];
        let mut taken: Vec<Vec<u32>> = vec![Vec::new(); experts.gate.len()];
        for (pair, expert) in chosen.iter().enumerate() {
            let row = u32::try_from(pair / top_k.max(1)).map_err(said)?;
            let of_expert = taken.get_mut(*expert as usize);
            of_expert
                .ok_or_else(|| format!("there is no expert {expert}"))?
                .push(row);
        }
        let mut groups = Vec::new();
        let mut first = 0;
        for (expert, rows) in taken
            .iter()
            .enumerate()
            .filter(|(_, rows)| !rows.is_empty())
        {
            groups.push(ExpertGroup {
                gate: &experts.gate[expert],
                up: &experts.up[expert],
                down: &experts.down[expert],
                rows,
                out_offset: first,
            });
            let pairs = chosen
                .iter()
                .enumerate()
                .filter(|(_, other)| **other as usize == expert);
            for (number, (pair, _)) in pairs.enumerate() {
                place[pair] = first + number;
            }
            first += rows.len();
        }
        let ffn = ExpertFfn {
            x: &x[..],
            hidden,
            groups: &groups,
            out: &mut results[..],
        };
        cpu.expert_ffn(ffn).map_err(said)?;
        let parts: Vec<&[f32]> = place
            .iter()
            .map(|at| &results[at * hidden..(at + 1) * hidden])
            .collect();
        let mut out = vec![f32::NAN; rows * hidden];
        let combine = Combine {
            parts: &parts,
            weights: &weights,
            top_k,
            width: hidden,
            out: &mut out,
        };
        cpu.combine(combine).map_err(said)?;
        Ok(Tensors::default().with("out", &[rows, hidden], Values::F32(out)))
    }

    /// `x`, `y` → `x`.
    fn add(&self) -> Result<Tensors, String> {
        let (mut x, y) = (self.array("x")?, self.array("y")?);
        let op = Add {
            x: x.view_mut(),
            y: y.view(),
        };
        self.executor.add(op).map_err(said)?;
        Ok(Tensors::default().with("x", &[x.extent()], Self::floats(&x)?))
    }

    /// `x`, `logits` → `x`.
    fn sigmoid_scale(&self) -> Result<Tensors, String> {
        let (rows, width, _) = self.inputs.rows("x")?;
        let (mut x, logits) = (self.array("x")?, self.array("logits")?);
        let op = SigmoidScale {
            x: x.view_mut(),
            logits: logits.view(),
            width,
        };
        self.executor.sigmoid_scale(op).map_err(said)?;
        Ok(Tensors::default().with("x", &[rows, width], Self::floats(&x)?))
    }

    /// `x`; number `limit` → `x`.
    fn clamp(&self) -> Result<Tensors, String> {
        let mut x = self.array("x")?;
        let op = Clamp {
            x: x.view_mut(),
            limit: self.inputs.number("limit")?,
        };
        self.executor.clamp(op).map_err(said)?;
        Ok(Tensors::default().with("x", &[x.extent()], Self::floats(&x)?))
    }

    /// `x`, `rows` → `out`.
    fn gather(&self) -> Result<Tensors, String> {
        let (_, width, _) = self.inputs.rows("x")?;
        let (x, rows) = (self.array("x")?, self.inputs.integers("rows")?);
        let mut out = self.poisoned(rows.len() * width)?;
        let op = Gather {
            x: x.view(),
            width,
            rows,
            out: out.view_mut(),
        };
        self.executor.gather(op).map_err(said)?;
        Ok(Tensors::default().with("out", &[rows.len(), width], Self::floats(&out)?))
    }
}
