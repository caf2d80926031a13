//! The custom resources on a real API server: what it takes, what it refuses, and with which words.
//!
//! `FOREGATE_API_SERVER` names the kubeconfig of one that may be written to; without it the test says so and is skipped. `KUBECONFIG` is
//! not used on purpose: it may point at a cluster that somebody needs.
#![expect(clippy::unwrap_used, reason = "a failure here is the test's failure")]

#[path = "admission/table.rs"]
mod table;

use foregate_crd::MoeCluster;
use k8s_openapi::api::core::v1::Namespace;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{DeleteParams, DynamicObject, Patch, PatchParams, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::core::ApiResource;
use kube::{Api, Client, Config};
use serde_json::{Value, json};

use table::{BAD, GOOD, Row};

const NAMESPACE: &str = "foregate-admission";

async fn client() -> Option<Client> {
    #[expect(
        clippy::disallowed_methods,
        reason = "a test that needs a server asks where it is"
    )]
    let found = std::env::var("FOREGATE_API_SERVER");
    let Ok(path) = found else {
        #[expect(clippy::print_stderr, reason = "a skip says so")]
        {
            eprintln!("skipped: FOREGATE_API_SERVER names no kubeconfig");
        }
        return None;
    };
    let file = Kubeconfig::read_from(path).unwrap();
    let options = KubeConfigOptions::default();
    let config = Config::from_custom_kubeconfig(file, &options)
        .await
        .unwrap();
    Some(Client::try_from(config).unwrap())
}

/// Installs the definitions and waits until they are served.
async fn installed(client: &Client) -> Api<DynamicObject> {
    let definitions: Api<CustomResourceDefinition> = Api::all(client.clone());
    for definition in foregate_crd::definitions().unwrap() {
        let name = definition.metadata.name.clone().unwrap();
        let how = PatchParams::apply("test").force();
        definitions
            .patch(&name, &how, &Patch::Apply(&definition))
            .await
            .unwrap();
        let served = kube::runtime::wait::conditions::is_crd_established();
        kube::runtime::wait::await_condition(definitions.clone(), &name, served)
            .await
            .unwrap();
    }
    let namespaces: Api<Namespace> = Api::all(client.clone());
    let namespace =
        json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": NAMESPACE } });
    let how = PatchParams::apply("test").force();
    namespaces
        .patch(NAMESPACE, &how, &Patch::Apply(&namespace))
        .await
        .unwrap();
    Api::namespaced_with(
        client.clone(),
        NAMESPACE,
        &ApiResource::erase::<MoeCluster>(&()),
    )
}

fn object(mut value: Value) -> DynamicObject {
    value["metadata"]["namespace"] = NAMESPACE.into();
    serde_json::from_value(value).unwrap()
}

#[tokio::test]
async fn the_api_server_takes_and_refuses_what_the_table_says() {
    let Some(client) = client().await else { return };
    let api = installed(&client).await;
    let dry = PostParams {
        dry_run: true,
        ..PostParams::default()
    };
    for Row { name, change, .. } in GOOD {
        let answer = api.create(&dry, &object(table::object(*change))).await;
        assert!(answer.is_ok(), "{name}: {answer:?}");
    }
    let mut wrong = Vec::new();
    for Row { name, change, says } in BAD {
        match api.create(&dry, &object(table::object(*change))).await {
            Ok(_) => wrong.push(format!("{name}: taken")),
            Err(error) if error.to_string().contains(says) => {}
            Err(error) => wrong.push(format!("{name}: {error}")),
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[tokio::test]
async fn defaults_scale_and_what_cannot_be_changed() {
    let Some(client) = client().await else { return };
    let api = installed(&client).await;
    let how = PatchParams::apply("test").force();
    let manifest = json!({
        "apiVersion": "foregate.dev/v1alpha1",
        "kind": "MoeCluster",
        "metadata": { "name": "small" },
        "spec": { "model": { "uri": "hf://org/name" } },
    });
    drop(api.delete("small", &DeleteParams::default()).await);
    let made = api
        .patch("small", &how, &Patch::Apply(&manifest))
        .await
        .unwrap();
    assert_eq!(made.data.pointer("/spec/workers/count"), Some(&json!(2)));
    assert_eq!(
        made.data.pointer("/spec/balancing/threshold"),
        Some(&json!(0.98))
    );
    assert_eq!(
        made.data.pointer("/spec/workers/kvMemory"),
        Some(&json!("512Mi"))
    );
    let scaled = json!({ "spec": { "replicas": 4 } });
    api.patch_scale("small", &PatchParams::default(), &Patch::Merge(&scaled))
        .await
        .unwrap();
    let now = api.get("small").await.unwrap();
    assert_eq!(now.data.pointer("/spec/workers/count"), Some(&json!(4)));
    for (field, value) in [
        ("model", json!({ "uri": "hf://org/other" })),
        ("model", json!({ "quantization": "int8" })),
        ("workers", json!({ "cpuPath": "avx2" })),
    ] {
        let change = json!({ "spec": { field: value } });
        let answer = api
            .patch("small", &PatchParams::default(), &Patch::Merge(&change))
            .await;
        let text = answer.unwrap_err().to_string();
        assert!(text.contains("cannot be changed"), "{text}");
    }
    // The sizes of the model are known now; fewer workers would need more slots than there is memory for.
    let limits =
        json!({ "spec": { "workers": { "resources": { "limits": { "memory": "2Gi" } } } } });
    api.patch("small", &PatchParams::default(), &Patch::Merge(&limits))
        .await
        .unwrap();
    let facts = json!({
        "experts": 32, "maxPositions": 1024, "kvBytesPerToken": 4096, "slotBytes": 128 << 20, "denseBytes": 32 << 20,
    });
    let status = json!({ "status": { "model": { "source": "x", "facts": facts } } });
    api.patch_status("small", &PatchParams::default(), &Patch::Merge(&status))
        .await
        .unwrap();
    let fewer = json!({ "spec": { "replicas": 2 } });
    let answer = api
        .patch_scale("small", &PatchParams::default(), &Patch::Merge(&fewer))
        .await;
    let text = answer.unwrap_err().to_string();
    assert!(
        text.contains("16 expert slots x 134217728 is more than"),
        "{text}"
    );
    api.delete("small", &DeleteParams::default()).await.unwrap();
}
