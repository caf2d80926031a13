//! The seam between rows of this process and what carries them from device to device: a stream of its own with memory on
//! both sides of the bus.

use std::fmt;

use crate::comm::RawStream;
use crate::driver::DriverError;

/// A stream that nobody else uses, with room on the device and in page-locked memory, as much one way as the other.
///
/// An exchange is: [`Lane::reserve`], fill [`Lane::outbox`], [`Lane::upload`], whatever reads and writes the device's room,
/// [`Lane::download`], ask [`Lane::passed`] until it is true, read [`Lane::inbox`]. In between nobody touches the boxes.
/// No call waits for the device.
pub trait Lane: fmt::Debug + Send {
    /// Makes the device that of the calling thread; first on every thread, before any other call.
    ///
    /// # Errors
    /// When the driver fails.
    fn enter(&mut self) -> Result<(), DriverError>;

    /// The stream.
    fn stream(&self) -> RawStream;

    /// Makes room for so many bytes each way. It grows only, while nothing is under way.
    ///
    /// # Errors
    /// When there is none, or the driver fails.
    fn reserve(&mut self, bytes: usize) -> Result<(), DriverError>;

    /// Addresses of the device's room: what is uploaded, and what will be downloaded.
    fn rooms(&self) -> (u64, u64);

    /// Page-locked memory that is uploaded.
    fn outbox(&mut self) -> &mut [u8];

    /// Page-locked memory that was downloaded into.
    fn inbox(&self) -> &[u8];

    /// Copies the first bytes of the outbox to the device, in the order of the stream.
    ///
    /// # Errors
    /// When the driver fails.
    fn upload(&mut self, bytes: usize) -> Result<(), DriverError>;

    /// Copies as many bytes to the inbox, in the order of the stream, and sets the mark that [`Lane::passed`] asks for.
    ///
    /// # Errors
    /// When the driver fails.
    fn download(&mut self, bytes: usize) -> Result<(), DriverError>;

    /// Whether the stream is past the last mark.
    ///
    /// # Errors
    /// When the driver fails, or something before the mark did.
    fn passed(&mut self) -> Result<bool, DriverError>;
}
