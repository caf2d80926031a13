//! Values that unit tests share.

use foregate_api::model::ModelSpec;

/// A small model of one MoE layer.
pub(crate) fn model(experts: usize) -> ModelSpec {
    let mut value = serde_json::json!({
        "family": "qwen3_moe", "formats": "float32", "vocab": 8, "hidden": 8, "layers": 1, "heads": 1, "kv_heads": 1,
        "head_dim": 8, "max_positions": 64, "rope_theta": 10000.0, "norm_eps": 1e-6, "qkv_bias": false,
        "clip_qkv": null, "tied_embeddings": true, "dense_inner": 8, "moe_blocks": [true], "top_k": 1,
        "expert_inner": 8, "norm_top_k": true, "shared_inner": null, "eos": [], "bos": null,
    });
    value["experts"] = experts.into();
    serde_json::from_value(value).unwrap()
}

/// An API server in memory: objects by path, and a record of what was asked.
pub(crate) mod api {
    use std::collections::{BTreeMap, BTreeSet};
    use std::sync::{Arc, Mutex, MutexGuard};

    use http::{Method, Request, Response, StatusCode};
    use kube::Client;
    use kube::client::Body;
    use serde_json::{Value, json};

    /// Group, resource (with its subresource) and verb, as roles have them.
    pub(crate) type Call = (String, String, String);

    #[derive(Debug, Default)]
    struct Inner {
        objects: BTreeMap<String, Value>,
        calls: Vec<Call>,
        made: u64,
        refuse: Option<String>,
    }

    #[derive(Debug, Clone, Default)]
    pub(crate) struct Api(Arc<Mutex<Inner>>);

    impl Api {
        pub(crate) fn client(&self) -> Client {
            let api = self.clone();
            let service = tower::service_fn(move |request: Request<Body>| {
                let api = api.clone();
                async move { Ok::<_, std::convert::Infallible>(api.answer(request).await) }
            });
            Client::new(service, "default")
        }

        fn lock(&self) -> MutexGuard<'_, Inner> {
            self.0.lock().unwrap()
        }

        /// Writes to this resource are refused from now on.
        pub(crate) fn refuse(&self, resource: Option<&str>) {
            self.lock().refuse = resource.map(str::to_owned);
        }

        /// What was asked since the last time.
        pub(crate) fn calls(&self) -> Vec<Call> {
            std::mem::take(&mut self.lock().calls)
        }

        /// Names of all objects of a resource.
        pub(crate) fn names(&self, resource: &str) -> BTreeSet<String> {
            let infix = format!("/{resource}/");
            let inner = self.lock();
            let found = inner
                .objects
                .keys()
                .filter_map(|path| path.split_once(&infix));
            found.map(|(_, name)| name.to_owned()).collect()
        }

        /// Looks at or changes an object.
        pub(crate) fn with<T>(
            &self,
            resource: &str,
            name: &str,
            look: impl FnOnce(&mut Value) -> T,
        ) -> T {
            let suffix = format!("/{resource}/{name}");
            let mut inner = self.lock();
            let found = inner
                .objects
                .iter_mut()
                .find(|(path, _)| path.ends_with(&suffix));
            look(found.unwrap_or_else(|| panic!("no {suffix}")).1)
        }

        /// Puts an object, its status as it was.
        pub(crate) fn insert(&self, path: &str, body: Value, uid: &str) {
            let mut inner = self.lock();
            inner.put(path, body);
            if let Some(object) = inner.objects.get_mut(path) {
                object["metadata"]["uid"] = json!(uid);
            }
        }

        pub(crate) fn remove(&self, resource: &str, name: &str) {
            let suffix = format!("/{resource}/{name}");
            self.lock()
                .objects
                .retain(|path, _| !path.ends_with(&suffix));
        }

        async fn answer(&self, request: Request<Body>) -> Response<Body> {
            let (parts, body) = request.into_parts();
            let body = body.collect_bytes().await.unwrap();
            let body: Value = serde_json::from_slice(&body).unwrap_or(Value::Null);
            let path = parts.uri.path().to_owned();
            let query = parts.uri.query().unwrap_or_default().to_owned();
            let (code, value) = self.lock().handle(&parts.method, &path, &query, body);
            let text = serde_json::to_vec(&value).unwrap();
            Response::builder()
                .status(code)
                .body(Body::from(text))
                .unwrap()
        }
    }

    impl Inner {
        fn handle(
            &mut self,
            method: &Method,
            path: &str,
            query: &str,
            body: Value,
        ) -> (StatusCode, Value) {
            let (group, rest) = match path.strip_prefix("/apis/") {
                Some(rest) => rest.split_once('/').unwrap(),
                None => ("", path.strip_prefix("/api/").unwrap()),
            };
            // v1/namespaces/NS/RESOURCE[/NAME[/SUBRESOURCE]]
            let steps: Vec<&str> = rest.split('/').skip(3).collect();
            let sub = steps.get(2).copied();
            let resource =
                steps[0].to_owned() + &sub.map(|s| format!("/{s}")).unwrap_or_default();
            let item = steps.len() > 1;
            let verb = match *method {
                Method::GET if item => "get",
                Method::GET => "list",
                Method::POST => "create",
                Method::PATCH => "patch",
                Method::PUT => "update",
                Method::DELETE => "delete",
                _ => "other",
            };
            self.calls
                .push((group.to_owned(), resource.clone(), verb.to_owned()));
            if verb != "get" && verb != "list" && self.refuse.as_ref() == Some(&resource) {
                return status(StatusCode::UNPROCESSABLE_ENTITY, "Invalid", "it is refused");
            }
            let path = path
                .strip_suffix(&format!("/{}", sub.unwrap_or("-")))
                .unwrap_or(path);
            match verb {
                "list" => self.list(path, query),
                "get" => match self.objects.get(path) {
                    Some(found) => (StatusCode::OK, found.clone()),
                    None => status(StatusCode::NOT_FOUND, "NotFound", path),
                },
                "create" => {
                    let name = body["metadata"]["name"]
                        .as_str()
                        .unwrap_or("generated")
                        .to_owned();
                    let path = format!("{path}/{name}");
                    if self.objects.contains_key(&path) {
                        return status(StatusCode::CONFLICT, "AlreadyExists", &path);
                    }
                    (StatusCode::CREATED, self.put(&path, body))
                }
                "patch" if sub.is_some() => match self.objects.get_mut(path) {
                    Some(found) => {
                        found["status"] = body["status"].clone();
                        (StatusCode::OK, found.clone())
                    }
                    None => status(StatusCode::NOT_FOUND, "NotFound", path),
                },
                "patch" if !query.contains("force=true") && self.conflicts(path, &body) => {
                    status(StatusCode::CONFLICT, "Conflict", "somebody else wrote this")
                }
                "patch" | "update" => (StatusCode::OK, self.put(path, body)),
                "delete" => match self.objects.remove(path) {
                    Some(found) => (StatusCode::OK, found),
                    None => status(StatusCode::NOT_FOUND, "NotFound", path),
                },
                _ => status(StatusCode::METHOD_NOT_ALLOWED, "MethodNotAllowed", path),
            }
        }

        /// Whether somebody else wrote what `body` would write otherwise. As with a real one, fields that only one of both has
        /// are no conflict.
        fn conflicts(&self, path: &str, body: &Value) -> bool {
            let before = self.objects.get(path);
            before.is_some_and(|old| !old["spec"].is_null() && old["spec"] != body["spec"])
        }

        /// Writes an object over the one that is there; its uid and status stay.
        fn put(&mut self, path: &str, mut body: Value) -> Value {
            self.made += 1;
            let before = self.objects.get(path);
            let uid = before.map(|old| old["metadata"]["uid"].clone());
            body["metadata"]["uid"] =
                uid.unwrap_or_else(|| json!(format!("uid-{}", self.made)));
            if let Some(status) = before.and_then(|old| old.get("status")) {
                body["status"] = status.clone();
            }
            self.objects.insert(path.to_owned(), body.clone());
            body
        }

        fn list(&self, path: &str, query: &str) -> (StatusCode, Value) {
            let selector = query
                .split('&')
                .find_map(|pair| pair.strip_prefix("labelSelector="))
                .unwrap_or_default()
                .replace("%3D", "=")
                .replace("%2C", ",")
                .replace("%2F", "/");
            let matches = |object: &Value| {
                selector
                    .split(',')
                    .filter(|pair| !pair.is_empty())
                    .all(|pair| {
                        let (key, value) = pair.split_once('=').unwrap();
                        object["metadata"]["labels"][key] == json!(value)
                    })
            };
            let named = query
                .split('&')
                .find_map(|pair| pair.strip_prefix("fieldSelector=metadata.name%3D"));
            let is_named =
                |object: &Value| named.is_none_or(|name| object["metadata"]["name"] == name);
            let prefix = format!("{path}/");
            let items: Vec<&Value> = self
                .objects
                .iter()
                .filter(|(path, object)| {
                    path.starts_with(&prefix) && matches(object) && is_named(object)
                })
                .map(|(_, object)| object)
                .collect();
            let list =
                json!({ "apiVersion": "v1", "kind": "List", "metadata": {}, "items": items });
            (StatusCode::OK, list)
        }
    }

    fn status(code: StatusCode, reason: &str, message: &str) -> (StatusCode, Value) {
        let value = json!({
            "apiVersion": "v1", "kind": "Status", "status": "Failure", "reason": reason, "message": message,
            "code": code.as_u16(),
        });
        (code, value)
    }
}
