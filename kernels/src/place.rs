//! Where values are: in this process's memory, or in that of a device.
//!
//! An [`Array`] owns values, and is of whoever made it: a vector of this process, or a [`Region`] of a device. A
//! [`View`] borrows a part of one. Argument structs of ops are generic over [`Memory`]: those of [`Ops`](crate::Ops)
//! are [`Host`] and have slices, so who computes on the processor cannot be handed a device's values; those of an
//! [`Executor`](crate::Executor) are [`Anywhere`] and have views.

use std::fmt;
use std::marker::PhantomData;
use std::ops::Range;

use crate::error::OpError;
use crate::executor::Executor;

/// A number that arrays are made of.
pub trait Element: bytemuck::Pod + fmt::Debug + Default + Send + Sync {}

impl Element for f32 {}
impl Element for u32 {}
impl Element for u64 {}

/// A range of a device's memory. Whoever made it frees it when this is dropped, and says in what order reads, writes
/// and ops take place: that of the calls, for calls of one thread.
pub trait Region: fmt::Debug + Send + Sync {
    /// Of the first byte, as the device counts.
    fn address(&self) -> u64;
    /// Its length.
    fn bytes(&self) -> usize;
    /// Number of the device within this process: addresses of another have no meaning to it.
    fn device(&self) -> u64;
    /// Copies `from` to byte `at`.
    ///
    /// # Errors
    /// When it reaches beyond the end, or the device refuses.
    fn write(&self, at: usize, from: &[u8]) -> Result<(), OpError>;
    /// Copies from byte `at`, after all ops before it are done.
    ///
    /// # Errors
    /// When it reaches beyond the end, or an op before it or the device failed.
    fn read(&self, at: usize, to: &mut [u8]) -> Result<(), OpError>;
}

/// How many values there are.
pub trait Extent {
    /// Number of values.
    fn extent(&self) -> usize;
}

impl<T> Extent for &[T] {
    fn extent(&self) -> usize {
        self.len()
    }
}

impl<T> Extent for &mut [T] {
    fn extent(&self) -> usize {
        self.len()
    }
}

/// Whose memory the arguments of an op are in.
pub trait Memory: fmt::Debug {
    /// Whether it is this process's for certain, weights and cache included.
    const HERE: bool;
    /// Values that are read.
    type In<'a, T: Element>: Copy + fmt::Debug + Extent;
    /// Values that are written.
    type Out<'a, T: Element>: fmt::Debug + Extent;
}

/// This process's: arguments are slices.
#[derive(Debug, Clone, Copy)]
pub struct Host;

impl Memory for Host {
    const HERE: bool = true;
    type In<'a, T: Element> = &'a [T];
    type Out<'a, T: Element> = &'a mut [T];
}

/// This process's or a device's: arguments are views.
#[derive(Debug, Clone, Copy)]
pub struct Anywhere;

impl Memory for Anywhere {
    const HERE: bool = false;
    type In<'a, T: Element> = View<'a, T>;
    type Out<'a, T: Element> = ViewMut<'a, T>;
}

/// Part of a device's memory: `len` values of `T` from value `at` on.
#[derive(Debug, Clone, Copy)]
pub struct Span<'a, T> {
    region: &'a dyn Region,
    at: usize,
    len: usize,
    of: PhantomData<&'a T>,
}

impl<'a, T: Element> Span<'a, T> {
    /// Of the first value, as the device counts.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.region.address() + (self.at * size_of::<T>()) as u64
    }

    /// The memory that it is part of.
    #[must_use]
    pub const fn region(&self) -> &'a dyn Region {
        self.region
    }

    /// Number of values.
    #[must_use]
    pub const fn extent(&self) -> usize {
        self.len
    }

    fn slice(self, range: Range<usize>) -> Self {
        let (start, end) = (range.start.min(self.len), range.end.min(self.len));
        Self {
            at: self.at + start,
            len: end.saturating_sub(start),
            ..self
        }
    }

    fn read(self, to: &mut [T]) -> Result<(), OpError> {
        let bytes = bytemuck::cast_slice_mut(to);
        self.region.read(self.at * size_of::<T>(), bytes)
    }
}

/// Borrowed values that are read.
#[derive(Debug, Clone, Copy)]
pub enum View<'a, T> {
    /// Of this process.
    Host(&'a [T]),
    /// Of a device.
    Device(Span<'a, T>),
}

/// Borrowed values that are written.
#[derive(Debug)]
pub enum ViewMut<'a, T> {
    /// Of this process.
    Host(&'a mut [T]),
    /// Of a device; nobody else has a view of the same values.
    Device(Span<'a, T>),
}

impl<'a, T: Element> View<'a, T> {
    /// The slice.
    ///
    /// # Errors
    /// When the values are on a device.
    pub fn host(self, op: &'static str, what: &'static str) -> Result<&'a [T], OpError> {
        match self {
            Self::Host(slice) => Ok(slice),
            Self::Device(_) => Err(OpError::OnDevice { op, what }),
        }
    }

    /// The device's memory.
    ///
    /// # Errors
    /// When the values are in this process.
    pub fn device(self, op: &'static str, what: &'static str) -> Result<Span<'a, T>, OpError> {
        match self {
            Self::Device(span) => Ok(span),
            Self::Host(_) => Err(OpError::OnHost { op, what }),
        }
    }

    /// Those of `range`, as far as there are.
    #[must_use]
    pub fn slice(self, range: Range<usize>) -> Self {
        match self {
            Self::Host(slice) => {
                let end = range.end.min(slice.len());
                Self::Host(&slice[range.start.min(end)..end])
            }
            Self::Device(span) => Self::Device(span.slice(range)),
        }
    }

    /// Copies all values to `to`, after all ops before it are done.
    ///
    /// # Errors
    /// When `to` has another length, or the device failed.
    pub fn read(self, to: &mut [T]) -> Result<(), OpError> {
        crate::ShapeError::check("read", "values", self.extent(), to.len())?;
        match self {
            Self::Host(slice) => {
                to.copy_from_slice(slice);
                Ok(())
            }
            Self::Device(span) => span.read(to),
        }
    }
}

impl<'a, T: Element> ViewMut<'a, T> {
    /// The slice.
    ///
    /// # Errors
    /// When the values are on a device.
    pub fn host(self, op: &'static str, what: &'static str) -> Result<&'a mut [T], OpError> {
        match self {
            Self::Host(slice) => Ok(slice),
            Self::Device(_) => Err(OpError::OnDevice { op, what }),
        }
    }

    /// The device's memory.
    ///
    /// # Errors
    /// When the values are in this process.
    pub fn device(self, op: &'static str, what: &'static str) -> Result<Span<'a, T>, OpError> {
        match self {
            Self::Device(span) => Ok(span),
            Self::Host(_) => Err(OpError::OnHost { op, what }),
        }
    }

    /// The same values again, for one op of several.
    #[must_use]
    pub fn again(&mut self) -> ViewMut<'_, T> {
        match self {
            Self::Host(slice) => ViewMut::Host(slice),
            Self::Device(span) => ViewMut::Device(*span),
        }
    }

    /// To read only.
    #[must_use]
    pub fn to_view(&self) -> View<'_, T> {
        match self {
            Self::Host(slice) => View::Host(slice),
            Self::Device(span) => View::Device(*span),
        }
    }

    /// Overwrites all values.
    ///
    /// # Errors
    /// When `from` has another length, or the device refuses.
    pub fn write(&mut self, from: &[T]) -> Result<(), OpError> {
        crate::ShapeError::check("write", "values", self.extent(), from.len())?;
        match self {
            Self::Host(slice) => {
                slice.copy_from_slice(from);
                Ok(())
            }
            Self::Device(span) => {
                let at = span.at * size_of::<T>();
                span.region.write(at, bytemuck::cast_slice(from))
            }
        }
    }
}

impl<T: Element> Extent for View<'_, T> {
    fn extent(&self) -> usize {
        match self {
            Self::Host(slice) => slice.len(),
            Self::Device(span) => span.len,
        }
    }
}

impl<T: Element> Extent for ViewMut<'_, T> {
    fn extent(&self) -> usize {
        self.to_view().extent()
    }
}

impl<'a, T> From<&'a [T]> for View<'a, T> {
    fn from(slice: &'a [T]) -> Self {
        Self::Host(slice)
    }
}

impl<'a, T> From<&'a Vec<T>> for View<'a, T> {
    fn from(values: &'a Vec<T>) -> Self {
        Self::Host(values)
    }
}

impl<'a, T> From<&'a mut [T]> for ViewMut<'a, T> {
    fn from(slice: &'a mut [T]) -> Self {
        Self::Host(slice)
    }
}

impl<'a, T> From<&'a mut Vec<T>> for ViewMut<'a, T> {
    fn from(values: &'a mut Vec<T>) -> Self {
        Self::Host(values)
    }
}

/// Owned values, where the executor that made them computes. A new one has none, and is this process's.
#[derive(Debug)]
pub struct Array<T>(Home<T>);

#[derive(Debug)]
enum Home<T> {
    Host(Vec<T>),
    Device(Box<dyn Region>, usize),
}

impl<T> Default for Array<T> {
    fn default() -> Self {
        Self(Home::Host(Vec::new()))
    }
}

impl<T: Element> Array<T> {
    /// Copies `values` to where `executor` computes; a processor keeps them as they are. `what` names them when there
    /// is no memory.
    ///
    /// # Errors
    /// When the device has no memory for them, or refuses the copy.
    pub fn of(
        executor: &dyn Executor,
        what: &'static str,
        values: Vec<T>,
    ) -> Result<Self, OpError> {
        let mut array = Self::default();
        match executor.allocate(what, size_of_val(values.as_slice()))? {
            None => array.0 = Home::Host(values),
            Some(region) => {
                array.0 = Home::Device(region, values.len());
                array.view_mut().write(&values)?;
            }
        }
        Ok(array)
    }

    /// The array at exactly this length, where `executor` computes, to be overwritten: what it holds is stale. Memory
    /// is kept when it becomes shorter.
    ///
    /// # Errors
    /// When the device has no memory for it.
    pub fn sized(
        &mut self,
        executor: &dyn Executor,
        what: &'static str,
        length: usize,
    ) -> Result<ViewMut<'_, T>, OpError> {
        let bytes = length * size_of::<T>();
        match &mut self.0 {
            Home::Device(region, len) if region.bytes() >= bytes => *len = length,
            Home::Host(values) if values.capacity() >= length && length > 0 => {
                values.resize(length, T::default());
            }
            home => match executor.allocate(what, bytes)? {
                Some(region) => *home = Home::Device(region, length),
                None => match home {
                    Home::Host(values) => values.resize(length, T::default()),
                    Home::Device(..) => *home = Home::Host(vec![T::default(); length]),
                },
            },
        }
        Ok(self.view_mut())
    }

    /// All values.
    #[must_use]
    pub fn view(&self) -> View<'_, T> {
        match &self.0 {
            Home::Host(values) => View::Host(values),
            Home::Device(region, len) => View::Device(span(&**region, *len)),
        }
    }

    /// All values, to write.
    pub fn view_mut(&mut self) -> ViewMut<'_, T> {
        match &mut self.0 {
            Home::Host(values) => ViewMut::Host(values),
            Home::Device(region, len) => ViewMut::Device(span(&**region, *len)),
        }
    }

    /// Those of `range`, to write, as far as there are.
    pub fn slice_mut(&mut self, range: Range<usize>) -> ViewMut<'_, T> {
        match &mut self.0 {
            Home::Host(values) => {
                let end = range.end.min(values.len());
                ViewMut::Host(&mut values[range.start.min(end)..end])
            }
            Home::Device(region, len) => ViewMut::Device(span(&**region, *len).slice(range)),
        }
    }

    /// Number of values.
    #[must_use]
    pub fn extent(&self) -> usize {
        self.view().extent()
    }
}

const fn span<T>(region: &dyn Region, len: usize) -> Span<'_, T> {
    Span {
        region,
        at: 0,
        len,
        of: PhantomData,
    }
}

#[cfg(test)]
mod tests;
