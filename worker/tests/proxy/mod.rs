//! A TCP proxy that cuts connections and flips bits when it is told to.
#![allow(unreachable_pub, reason = "shared by test targets")]

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

#[derive(Debug, Default)]
struct Shared {
    open: Mutex<Vec<TcpStream>>,
    corrupt_request: AtomicBool,
    corrupt_answer: AtomicBool,
    closed: AtomicBool,
}

/// Forwards connections to one address.
#[derive(Debug)]
pub struct Proxy {
    shared: Arc<Shared>,
    address: String,
}

impl Proxy {
    pub fn to(target: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let shared = Arc::new(Shared::default());
        let (for_thread, target) = (Arc::clone(&shared), target.to_owned());
        thread::spawn(move || {
            while let Ok((client, _)) = listener.accept() {
                if for_thread.closed.load(Ordering::Acquire) {
                    return;
                }
                forward(&for_thread, client, &target);
            }
        });
        Self { shared, address }
    }

    pub fn address(&self) -> String {
        self.address.clone()
    }

    /// Ends every connection; new ones are forwarded again.
    pub fn cut(&self) {
        for stream in self.shared.open.lock().unwrap().drain(..) {
            stream.shutdown(Shutdown::Both).ok();
        }
    }

    /// Flips a bit in what a caller sends next.
    pub fn corrupt_next_request(&self) {
        self.shared.corrupt_request.store(true, Ordering::Release);
    }

    /// Flips a bit in what a callee sends next.
    pub fn corrupt_next_answer(&self) {
        self.shared.corrupt_answer.store(true, Ordering::Release);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.closed.store(true, Ordering::Release);
        self.cut();
        drop(TcpStream::connect(&self.address));
    }
}

fn forward(shared: &Arc<Shared>, client: TcpStream, target: &str) {
    let Ok(server) = TcpStream::connect(target) else {
        return;
    };
    client.set_nodelay(true).unwrap();
    server.set_nodelay(true).unwrap();
    let mut open = shared.open.lock().unwrap();
    open.push(client.try_clone().unwrap());
    open.push(server.try_clone().unwrap());
    drop(open);
    let ways = [
        (
            client.try_clone().unwrap(),
            server.try_clone().unwrap(),
            true,
        ),
        (server, client, false),
    ];
    for (from, to, request) in ways {
        let shared = Arc::clone(shared);
        thread::spawn(move || pump(&shared, from, to, request));
    }
}

fn pump(shared: &Shared, mut from: TcpStream, mut to: TcpStream, request: bool) {
    let flag = if request {
        &shared.corrupt_request
    } else {
        &shared.corrupt_answer
    };
    let mut buffer = [0_u8; 64 << 10];
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        if flag.swap(false, Ordering::AcqRel) {
            buffer[count - 1] ^= 0x10;
        }
        if to.write_all(&buffer[..count]).is_err() {
            break;
        }
    }
    from.shutdown(Shutdown::Both).ok();
    to.shutdown(Shutdown::Both).ok();
}
