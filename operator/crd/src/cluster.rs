//! `MoeCluster`: the manifest as a resource, with the status that the operator writes.

use foregate_api::manifest::{ClusterSpec, KIND, Manifest, Metadata};
use foregate_api::model::ModelFacts;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
    CustomResourceColumnDefinition, CustomResourceDefinition, CustomResourceSubresourceScale,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, ObjectMeta};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::rules;
use crate::schema::{self, Kind, SchemaError};

/// A cluster that serves one mixture-of-experts model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct MoeCluster {
    /// `apiVersion` and `kind`.
    #[serde(flatten, default)]
    #[schemars(skip)]
    pub types: Option<kube::core::TypeMeta>,
    /// Name, namespace, labels.
    #[schemars(skip)]
    pub metadata: ObjectMeta,
    /// What is wanted. The same document is what `foregate up -f` reads.
    pub spec: ClusterSpec,
    /// What is, as the operator last saw it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<MoeClusterStatus>,
}

crate::resource!(MoeCluster, "moeclusters");

impl MoeCluster {
    /// The manifest that this object is.
    #[must_use]
    pub fn manifest(&self) -> Manifest {
        Manifest {
            api_version: Self::types().api_version,
            kind: KIND.to_owned(),
            metadata: Metadata {
                name: self.metadata.name.clone().unwrap_or_default(),
                namespace: self.metadata.namespace.clone(),
                labels: self.metadata.labels.clone().unwrap_or_default(),
                annotations: self.metadata.annotations.clone().unwrap_or_default(),
            },
            spec: self.spec.clone(),
        }
    }

    /// The object that a manifest is.
    #[must_use]
    pub fn of(manifest: Manifest) -> Self {
        let Metadata {
            name,
            namespace,
            labels,
            annotations,
        } = manifest.metadata;
        Self {
            types: Some(Self::types()),
            metadata: ObjectMeta {
                name: Some(name),
                namespace,
                labels: (!labels.is_empty()).then_some(labels),
                annotations: (!annotations.is_empty()).then_some(annotations),
                ..ObjectMeta::default()
            },
            spec: manifest.spec,
            status: None,
        }
    }
}

/// What is, as the operator last saw it.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct MoeClusterStatus {
    /// Generation of the manifest that this status is about.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// How the cluster is. `Ready` is the one to wait for.
    pub conditions: Vec<Condition>,
    /// Workers whose pods exist; what the scale subresource reports.
    pub replicas: i32,
    /// Workers that serve.
    pub ready_replicas: i32,
    /// Selector of the workers' pods, for the scale subresource.
    pub selector: String,
    /// Gateways that are available.
    pub gateways: i32,
    /// Number of the active placement, 0 before the first.
    pub epoch: i64,
    /// Where the API is reached inside the cluster.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
    /// How the model is divided, as the workers report it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub parallelism: Option<Parallelism>,
    /// What is known of the model.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<InspectedModel>,
    /// Memory that the worker needs that needs most.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<MemoryPlan>,
}

/// How the model is divided, as the workers report it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Parallelism {
    /// Ranks that run attention: each has sequences of its own (data parallel).
    pub attention_ranks: u32,
    /// Ranks that hold experts in the active placement (expert parallel).
    pub expert_ranks: u32,
    /// Expert slots per MoE layer of the rank with experts that has fewest.
    pub fewest_slots: u32,
    /// Instruction paths that the ranks chose, each once, ascending.
    pub cpu_paths: Vec<String>,
}

/// What is known of the model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct InspectedModel {
    /// What was looked at: URI and formats of the manifest.
    pub source: String,
    /// Its sizes.
    pub facts: ModelFacts,
}

/// Memory that the worker needs that needs most, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct MemoryPlan {
    /// Keys and values.
    pub kv_bytes: u64,
    /// Expert slots over all layers.
    pub expert_bytes: u64,
    /// All weights that are no expert's.
    pub dense_bytes: u64,
    /// The sum.
    pub total_bytes: u64,
}

/// The definition to install.
///
/// # Errors
/// See [`SchemaError`].
pub fn definition() -> Result<CustomResourceDefinition, SchemaError> {
    let mut object = schema::generate::<MoeCluster>()?;
    rules::constrain(&mut object)?;
    schema::definition(
        Kind {
            kind: "MoeCluster",
            plural: "moeclusters",
            singular: "moecluster",
            short: "moe",
            columns: columns(),
            scale: Some(CustomResourceSubresourceScale {
                spec_replicas_path: ".spec.workers.count".to_owned(),
                status_replicas_path: ".status.replicas".to_owned(),
                label_selector_path: Some(".status.selector".to_owned()),
            }),
        },
        object,
    )
}

fn columns() -> Vec<CustomResourceColumnDefinition> {
    let condition =
        |of: &str, what: &str| format!(".status.conditions[?(@.type=='{of}')].{what}");
    vec![
        schema::column("Ready", "string", &condition("Ready", "status"), 0),
        schema::column("Reason", "string", &condition("Ready", "reason"), 0),
        schema::column("Workers", "integer", ".spec.workers.count", 0),
        schema::column("Serving", "integer", ".status.readyReplicas", 0),
        schema::column("Epoch", "integer", ".status.epoch", 0),
        schema::column("Age", "date", ".metadata.creationTimestamp", 0),
        schema::column("Model", "string", ".spec.model.uri", 1),
        schema::column("Gateways", "integer", ".status.gateways", 1),
        schema::column(
            "Covered",
            "string",
            &condition("ExpertsCovered", "status"),
            1,
        ),
        schema::column("Balanced", "string", &condition("Balanced", "status"), 1),
        schema::column("URL", "string", ".status.url", 1),
    ]
}
