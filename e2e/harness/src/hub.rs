//! A server that speaks the Hugging Face hub's API for one repository, with faults on demand.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

/// The commit of every file.
pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// What the server has and how it behaves.
#[derive(Debug, Clone, Default)]
pub struct Content {
    /// `org/name`.
    pub repo: String,
    /// Revisions that exist beside the commit.
    pub revisions: Vec<String>,
    /// File name → bytes.
    pub files: BTreeMap<String, Vec<u8>>,
    /// The token that is wanted, if any.
    pub token: Option<String>,
    /// Break the connection once, after this many bytes of this file.
    pub cut: Option<(String, usize)>,
    /// Serve weights through a redirect to another path, as the hub does with large files.
    pub redirect: bool,
}

/// One request as it came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// Path with query.
    pub path: String,
    /// The Range header.
    pub range: Option<String>,
}

/// The server. It ends with its owner.
#[derive(Debug)]
pub struct Hub {
    /// Its URL, for `HF_ENDPOINT`.
    pub url: String,
    state: Arc<Mutex<State>>,
    _tasks: JoinSet<()>,
}

#[derive(Debug)]
struct State {
    content: Content,
    seen: Vec<Seen>,
}

impl Hub {
    /// Listens on a free port.
    ///
    /// # Panics
    /// If there is none.
    pub async fn start(content: Content) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let url = format!("http://{}", listener.local_addr().expect("an address"));
        let state = Arc::new(Mutex::new(State {
            content,
            seen: Vec::new(),
        }));
        let mut tasks = JoinSet::new();
        let shared = Arc::clone(&state);
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                connections.spawn(serve(stream, Arc::clone(&shared)));
            }
        });
        Self {
            url,
            state,
            _tasks: tasks,
        }
    }

    /// The requests so far.
    ///
    /// # Panics
    /// Never in practice.
    #[must_use]
    pub fn seen(&self) -> Vec<Seen> {
        self.state.lock().expect("no panic inside").seen.clone()
    }
}

/// An answer: status line, headers, body, and after how many bytes of it the line is cut.
struct Answer {
    status: &'static str,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
    cut: Option<usize>,
}

impl Answer {
    fn error(status: &'static str, code: &str) -> Self {
        Self {
            status,
            headers: vec![("X-Error-Code", code.to_owned())],
            body: br#"{"error":"as asked"}"#.to_vec(),
            cut: None,
        }
    }
}

/// One request per connection: simple, and a cut line is then what it is in life.
async fn serve(mut stream: TcpStream, state: Arc<Mutex<State>>) {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        match stream.read_u8().await {
            Ok(byte) if head.len() < 16_384 => head.push(byte),
            _ => return,
        }
    }
    let head = String::from_utf8_lossy(&head).into_owned();
    let answer = answer(&head, &mut state.lock().expect("no panic inside"));
    let mut bytes = format!(
        "HTTP/1.1 {}\r\nContent-Length: {}\r\nConnection: close\r\n",
        answer.status,
        answer.body.len()
    );
    for (name, value) in &answer.headers {
        bytes.push_str(&format!("{name}: {value}\r\n"));
    }
    bytes.push_str("\r\n");
    let end = answer.cut.unwrap_or(answer.body.len());
    for piece in [bytes.as_bytes(), &answer.body[..end]] {
        if stream.write_all(piece).await.is_err() {
            return;
        }
    }
    drop(stream.shutdown().await);
}

fn header<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    head.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        key.eq_ignore_ascii_case(name).then(|| value.trim())
    })
}

fn answer(head: &str, state: &mut State) -> Answer {
    let path = head.split(' ').nth(1).unwrap_or_default().to_owned();
    let range = header(head, "range").map(str::to_owned);
    state.seen.push(Seen {
        path: path.clone(),
        range: range.clone(),
    });
    let content = &mut state.content;
    let given = header(head, "authorization").and_then(|value| value.strip_prefix("Bearer "));
    let stored = path.strip_prefix("/storage/");
    if stored.is_none() && content.token.is_some() && content.token.as_deref() != given {
        return Answer::error("401 Unauthorized", "RepoNotFound");
    }
    if let Some(file) = stored {
        return file_answer(content, file, range.as_deref());
    }
    let api = format!("/api/models/{}/revision/", content.repo);
    if let Some(revision) = path.strip_prefix(&api) {
        return info_answer(content, revision);
    }
    let resolve = format!("/{}/resolve/", content.repo);
    let Some((revision, file)) = path.strip_prefix(&resolve).and_then(|r| r.split_once('/'))
    else {
        return Answer::error("404 Not Found", "RepoNotFound");
    };
    if !known(content, revision) {
        return Answer::error("404 Not Found", "RevisionNotFound");
    }
    if content.redirect && file.ends_with(".safetensors") && content.files.contains_key(file) {
        let size = content.files[file].len();
        return Answer {
            status: "302 Found",
            headers: vec![
                ("Location", format!("/storage/{file}")),
                ("X-Repo-Commit", COMMIT.to_owned()),
                ("X-Linked-Etag", format!("\"{}\"", etag(file, size))),
                ("X-Linked-Size", size.to_string()),
            ],
            body: Vec::new(),
            cut: None,
        };
    }
    file_answer(content, file, range.as_deref())
}

fn known(content: &Content, revision: &str) -> bool {
    revision == COMMIT || content.revisions.iter().any(|known| known == revision)
}

fn info_answer(content: &Content, revision: &str) -> Answer {
    if !known(content, revision) {
        return Answer::error("404 Not Found", "RevisionNotFound");
    }
    let files: Vec<_> = content
        .files
        .keys()
        .map(|name| serde_json::json!({ "rfilename": name }))
        .collect();
    let body = serde_json::json!({ "id": content.repo, "sha": COMMIT, "siblings": files });
    Answer {
        status: "200 OK",
        headers: vec![("Content-Type", "application/json".to_owned())],
        body: body.to_string().into_bytes(),
        cut: None,
    }
}

fn etag(file: &str, size: usize) -> String {
    format!("{}-{size}", file.replace('.', "-"))
}

fn file_answer(content: &mut Content, file: &str, range: Option<&str>) -> Answer {
    let Some(bytes) = content.files.get(file) else {
        return Answer::error("404 Not Found", "EntryNotFound");
    };
    let size = bytes.len();
    let (first, last) = match range.and_then(|range| parse(range, size)) {
        Some(span) => span,
        None if range.is_some() => return Answer::error("416 Range Not Satisfiable", "Range"),
        None => (0, size - 1),
    };
    let body = bytes[first..=last].to_vec();
    let cut = match &content.cut {
        // Not the probe for the length, which asks for one byte.
        Some((name, after)) if name == file && body.len() > *after => Some(*after),
        _ => None,
    };
    if cut.is_some() {
        content.cut = None;
    }
    Answer {
        status: if range.is_some() {
            "206 Partial Content"
        } else {
            "200 OK"
        },
        headers: vec![
            ("ETag", format!("\"{}\"", etag(file, size))),
            ("X-Repo-Commit", COMMIT.to_owned()),
            ("Accept-Ranges", "bytes".to_owned()),
            ("Content-Range", format!("bytes {first}-{last}/{size}")),
        ],
        body,
        cut,
    }
}

/// `bytes=first-[last]` within `size`.
fn parse(range: &str, size: usize) -> Option<(usize, usize)> {
    let (first, last) = range.strip_prefix("bytes=")?.split_once('-')?;
    let first: usize = first.parse().ok()?;
    let last = match last {
        "" => size.checked_sub(1)?,
        text => text.parse::<usize>().ok()?.min(size.checked_sub(1)?),
    };
    (first <= last).then_some((first, last))
}
