//! Wrong input, as tables: over HTTP, in manifests, on the command line, in model files. Each error names what is
//! wrong, and the server serves on.
#![expect(clippy::unwrap_used, reason = "a failure here is the test's failure")]

use foregate_harness::binary::Start;
use foregate_harness::client::Client;
use foregate_harness::manifest::ManifestFile;
use foregate_harness::repository;
use serde_json::{Value, json};
use tempfile::TempDir;

const BINARY: &str = env!("CARGO_BIN_EXE_foregate");

/// Path, body, status, and what the error must name.
fn http_table() -> Vec<(&'static str, Value, u16, &'static str)> {
    let chat = |extra: Value| {
        let mut body = json!({"model": "demo", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2});
        body.as_object_mut()
            .unwrap()
            .extend(extra.as_object().unwrap().clone());
        body
    };
    let completion = |extra: Value| {
        let mut body = json!({"model": "demo", "prompt": "hi", "max_tokens": 2});
        body.as_object_mut()
            .unwrap()
            .extend(extra.as_object().unwrap().clone());
        body
    };
    let (c, t) = ("/v1/chat/completions", "/v1/completions");
    vec![
        (c, json!([]), 400, "object"),
        (c, json!({"model": "demo"}), 400, "messages"),
        (c, chat(json!({"messages": []})), 400, "messages"),
        (
            c,
            chat(json!({"messages": [{"role": "user"}]})),
            400,
            "content",
        ),
        (
            c,
            chat(json!({"messages": [{"role": "wizard", "content": "x"}]})),
            400,
            "role",
        ),
        (c, chat(json!({"model": "other"})), 404, "other"),
        (c, chat(json!({"temperature": 9})), 400, "temperature"),
        (c, chat(json!({"temperature": "hot"})), 400, "temperature"),
        (c, chat(json!({"top_logprobs": 2})), 400, "logprobs"),
        (
            c,
            chat(json!({"tools": [{"type": "function", "function": {"name": "f"}}]})),
            400,
            "tools",
        ),
        (
            c,
            chat(json!({"response_format": {"type": "json_object"}})),
            400,
            "response_format",
        ),
        (c, chat(json!({"frobnicate": 1})), 400, "frobnicate"),
        (
            c,
            chat(json!({"stream_options": {"include_usage": true}})),
            400,
            "stream_options",
        ),
        (t, json!({"model": "demo"}), 400, "prompt"),
        (t, completion(json!({"prompt": []})), 400, "prompt"),
        (t, completion(json!({"prompt": [-1]})), 400, "prompt"),
        (
            t,
            completion(json!({"prompt": [4_000_000_000_u64]})),
            400,
            "prompt",
        ),
        (t, completion(json!({"prompt": [[1], "x"]})), 200, ""),
        (t, completion(json!({"n": 0})), 400, "n"),
        (t, completion(json!({"max_tokens": 0})), 400, "max_tokens"),
        (t, completion(json!({"max_tokens": 100_000})), 400, "max"),
        (t, completion(json!({"top_p": 0})), 400, "top_p"),
        (t, completion(json!({"min_p": 2})), 400, "min_p"),
        (t, completion(json!({"stop": [""]})), 400, "stop"),
        (t, completion(json!({"logprobs": 1000})), 400, "logprobs"),
        (
            t,
            completion(json!({"logit_bias": {"x": 1}})),
            400,
            "logit_bias",
        ),
        (
            t,
            completion(json!({"logit_bias": {"1": 1000}})),
            400,
            "logit_bias",
        ),
        (t, completion(json!({"best_of": 3})), 400, "best_of"),
        (t, completion(json!({"suffix": "end"})), 400, "suffix"),
        (
            t,
            completion(json!({"prompt": "x ".repeat(5000)})),
            400,
            "2048",
        ),
        ("/tokenize", json!({}), 400, "prompt"),
        ("/detokenize", json!({"tokens": ["a"]}), 400, "tokens"),
        (
            "/detokenize",
            json!({"tokens": [99_999_999]}),
            400,
            "tokens",
        ),
    ]
}

#[tokio::test]
async fn http() {
    let cluster = Start::up(BINARY, &[]).ready().await;
    let client = Client::new(&cluster.url);
    for (path, body, status, names) in http_table() {
        let (got, answer) = client.post(path, &body).await;
        assert_eq!(got.as_u16(), status, "{path} {body}: {answer}");
        if status != 200 {
            let error = &answer["error"];
            let text = format!("{} {}", error["message"], error["param"]);
            assert!(
                text.contains(names),
                "{path} {body}: no {names:?} in {answer}"
            );
            assert!(error["type"].is_string(), "{answer}");
        }
    }
    for (bytes, what) in [
        (b"".to_vec(), "empty"),
        (b"{".to_vec(), "cut"),
        (vec![0xff; 64], "no UTF-8"),
        (b"[".repeat(100_000), "deep"),
    ] {
        let answer = client
            .raw("/v1/completions", "application/json", bytes)
            .await;
        assert_eq!(answer.status().as_u16(), 400, "{what}");
    }
    // The answer may get lost when the server closes before the client has sent all of it.
    let huge = client
        .refused("/v1/completions", vec![b' '; 64 << 20])
        .await;
    assert!(
        matches!(huge.map(|status| status.as_u16()), None | Some(413)),
        "{huge:?}"
    );
    let (status, text) = client.get("/v1/nothing").await;
    assert_eq!(status.as_u16(), 404, "{text}");
    let (status, text) = client.get("/v1/completions").await;
    assert_eq!(status.as_u16(), 405, "{text}");
    // After all of it, it serves.
    let fine = json!({"prompt": "And the LORD", "max_tokens": 2, "temperature": 0});
    drop(client.ok("/v1/completions", &fine).await);
    let (status, stderr) = cluster.stop().await;
    assert!(status.success(), "{status}\n{stderr}");
}

async fn fails(start: Start, code: i32, words: &[&str]) {
    let (got, stdout, stderr) = start.run().await;
    assert_eq!(got, Some(code), "{start:?}\n{stdout}\n{stderr}");
    for word in words {
        assert!(stderr.contains(word), "{start:?}: no {word:?} in: {stderr}");
    }
    assert!(!stderr.contains("panicked"), "{stderr}");
}

#[tokio::test]
async fn manifests() {
    let good = "apiVersion: foregate.dev/v1alpha1\nkind: MoeCluster\nmetadata:\n  name: x\nspec:\n  model:\n    uri: m\n";
    let table = [
        (String::new(), vec!["empty"]),
        ("{".to_owned(), vec!["manifest"]),
        (
            good.replace("MoeCluster", "Pod"),
            vec!["kind", "MoeCluster"],
        ),
        (
            good.replace("v1alpha1", "v9"),
            vec!["apiVersion", "v1alpha1"],
        ),
        (good.replace("name: x", "name: X_y"), vec!["metadata.name"]),
        (format!("{good}  wrokers:\n    count: 2\n"), vec!["wrokers"]),
        (
            format!("{good}  workers:\n    count: 0\n"),
            vec!["spec.workers.count"],
        ),
        (
            format!("{good}  workers:\n    kvMemory: lots\n"),
            vec!["spec.workers.kvMemory"],
        ),
        (
            format!("{good}  workers:\n    count: 0\n  balancing:\n    threshold: 3\n"),
            vec!["spec.workers.count", "spec.balancing.threshold"],
        ),
        (
            good.replace("uri: m", "uri: s3://bucket/m"),
            vec!["spec.model.uri"],
        ),
    ];
    for (text, words) in table {
        let manifest = ManifestFile::text(&text);
        fails(Start::up(BINARY, &["-f", manifest.argument()]), 2, &words).await;
    }
    let demo = ManifestFile::demo("  workers:\n    kvMemory: 1Mi\n");
    let long = std::fs::read_to_string(demo.path()).unwrap();
    let long =
        ManifestFile::text(&long.replace("servedNames", "maxModelLen: 2048\n    servedNames"));
    fails(
        Start::up(BINARY, &["-f", long.argument()]),
        2,
        &["kvMemory", "2048"],
    )
    .await;
}

#[tokio::test]
async fn arguments() {
    for (arguments, words) in [
        (vec!["up", "--workers", "0"], vec!["--workers"]),
        (vec!["up", "--workers", "many"], vec!["--workers"]),
        (vec!["up", "--port", "99999"], vec!["--port"]),
        (
            vec!["up", "--quantization", "int3"],
            vec!["--quantization", "int3", "mxfp4"],
        ),
        (
            vec!["up", "--dtype", "half"],
            vec!["--dtype", "half", "float16"],
        ),
        (
            vec!["up", "--etcd", "http://127.0.0.1:1"],
            vec!["--processes"],
        ),
        (vec!["up", "-f", "a.yaml", "--model", "b"], vec!["--model"]),
        (vec!["up", "-f", "/no/such.yaml"], vec!["/no/such.yaml"]),
        (
            vec!["up", "--port", "0", "--processes", "--etcd", "nonsense"],
            vec!["--etcd", "http://"],
        ),
        (vec!["serve"], vec!["serve"]),
        (
            vec!["worker", "--config", "/no/such.json"],
            vec!["/no/such.json"],
        ),
    ] {
        fails(Start::new(BINARY, &arguments), 2, &words).await;
    }
    fails(
        Start::up(BINARY, &[]).env("OTEL_EXPORTER_OTLP_ENDPOINT", "https://x"),
        2,
        &["OTEL_EXPORTER_OTLP_ENDPOINT"],
    )
    .await;
    fails(
        Start::up(BINARY, &[]).env("RUST_LOG", "a=b=c"),
        2,
        &["RUST_LOG"],
    )
    .await;
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    fails(
        Start::new(BINARY, &["up", "--port", &port]),
        1,
        &[&port, "--port"],
    )
    .await;
    fails(
        Start::new(BINARY, &["up", "--port", "0", "--host", "203.0.113.7"]),
        1,
        &["203.0.113.7", "--host"],
    )
    .await;
}

#[tokio::test]
async fn models() {
    let source = repository("worker/models/tests/fixtures/qwen3_moe");
    let broken = |change: &dyn Fn(&std::path::Path)| {
        let copy = TempDir::new().unwrap();
        for name in ["config.json", "generation_config.json", "model.safetensors"] {
            std::fs::copy(source.join(name), copy.path().join(name)).unwrap();
        }
        change(copy.path());
        copy
    };
    type Change = Box<dyn Fn(&std::path::Path)>;
    let write = |name: &'static str, text: &'static str| -> Change {
        Box::new(move |path| std::fs::write(path.join(name), text).unwrap())
    };
    let remove = |name: &'static str| -> Change {
        Box::new(move |path| std::fs::remove_file(path.join(name)).unwrap())
    };
    let cut: Change = Box::new(|path| {
        let file = path.join("model.safetensors");
        let bytes = std::fs::read(&file).unwrap();
        std::fs::write(file, &bytes[..bytes.len() / 2]).unwrap();
    });
    let edit: Change = Box::new(|path| {
        let file = path.join("config.json");
        let text = std::fs::read_to_string(&file).unwrap();
        let mut config: Value = serde_json::from_str(&text).unwrap();
        config["rope_scaling"] = json!({"rope_type": "martian", "factor": 2.0});
        std::fs::write(file, config.to_string()).unwrap();
    });
    for (change, words) in [
        (remove("config.json"), vec!["config.json"]),
        (write("config.json", "{}"), vec!["model_type"]),
        (write("config.json", "not json"), vec!["config.json"]),
        (edit, vec!["rope"]),
        (remove("model.safetensors"), vec!["safetensors"]),
        (
            write("model.safetensors", "short"),
            vec!["model.safetensors"],
        ),
        (cut, vec!["model.safetensors"]),
    ] {
        let directory = broken(&*change);
        let model = directory.path().to_string_lossy().into_owned();
        fails(Start::up(BINARY, &["--model", &model]), 1, &words).await;
    }
    let quantised = repository("worker/models/tests/fixtures/formats/awq");
    let model = quantised.to_string_lossy().into_owned();
    fails(
        Start::up(BINARY, &["--model", &model, "--quantization", "int8"]),
        1,
        &["quantization", "already quantised (awq)"],
    )
    .await;
    fails(
        Start::up(BINARY, &["--model", "./no/such/dir"]),
        1,
        &["does not exist"],
    )
    .await;
}
