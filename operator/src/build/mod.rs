//! Validated cluster + launch plan → the objects of Kubernetes. Pure: the same input, the same bytes.
//!
//! Workers are pods of the operator's own, one per rank: a StatefulSet would not replace a pod whose node is lost, and
//! would choose itself when a rank goes, which only the plan may. Gateways are alike, so a Deployment keeps them.

mod certificates;
mod config;
mod gateways;
mod guards;
mod inspector;
mod workers;

use std::collections::BTreeMap;

use foregate_api::ids::Rank;
use foregate_api::tls::StoreTls;
use foregate_crd::MoeCluster;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use kube::core::{ApiResource, TypeMeta};
use kube::{Resource, ResourceExt as _};
use serde::Serialize;
use serde_json::Value;

use crate::launch::LaunchPlan;
use crate::source::Source;
use crate::validate::ValidatedCluster;

pub(crate) use certificates::{domain, etcd_keys, etcd_secret, keys, keys_secret};
pub(crate) use inspector::{inspector, source_key};
pub(crate) use workers::name as worker_name;

/// Who writes the objects, as field manager and as label.
pub(crate) const MANAGER: &str = "foregate-operator";
/// Label: the rank of a worker's pod.
pub(crate) const RANK: &str = "foregate.dev/rank";
/// Annotation: hash of everything that a pod was made from.
pub(crate) const CONFIG: &str = "foregate.dev/config";
/// Annotation: expert slots per MoE layer that a worker was started with.
pub(crate) const SLOTS: &str = "foregate.dev/slots";
/// Annotation: what an inspector looks at.
pub(crate) const SOURCE: &str = "foregate.dev/source";

/// What a role's pods are called in labels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Component {
    /// A rank.
    Worker,
    /// The HTTP side.
    Gateway,
    /// Looks at the model.
    Inspector,
    /// The cluster as a whole.
    Cluster,
}

impl Component {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Worker => "worker",
            Self::Gateway => "gateway",
            Self::Inspector => "inspector",
            Self::Cluster => "cluster",
        }
    }
}

/// What the operator adds to every manifest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Defaults {
    /// Image of pods whose manifest names none: the operator's own.
    pub image: String,
    /// The same for workers that compute on cards.
    pub cuda_image: String,
    /// etcd's client URLs.
    pub etcd: Vec<String>,
    /// The operator's own files with keys of a client of etcd, where its URLs are https. Pods get copies.
    pub etcd_tls: Option<StoreTls>,
}

/// The resource that owns everything.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Owner {
    pub(crate) name: String,
    pub(crate) namespace: String,
    pub(crate) uid: String,
}

impl Owner {
    /// `None` for an object that the API server has not stored yet.
    pub(crate) fn of(cluster: &MoeCluster) -> Option<Self> {
        Some(Self {
            name: cluster.metadata.name.clone()?,
            namespace: cluster.namespace()?,
            uid: cluster.uid()?,
        })
    }

    /// Name of the cluster in the store. The part of the uid keeps a cluster apart from an earlier one of the same name.
    pub(crate) fn store_name(&self) -> String {
        let uid: String = self.uid.chars().take(8).collect();
        format!("{}.{}.{uid}", self.namespace, self.name)
    }

    /// Whether an object names this cluster among its owners.
    pub(crate) fn owns(&self, object: &impl kube::ResourceExt) -> bool {
        let mut owners = object.owner_references().iter();
        owners.any(|reference| reference.uid == self.uid)
    }

    pub(crate) fn reference(&self) -> OwnerReference {
        let TypeMeta { api_version, kind } = MoeCluster::types();
        OwnerReference {
            api_version,
            kind,
            name: self.name.clone(),
            uid: self.uid.clone(),
            controller: Some(true),
            block_owner_deletion: None,
        }
    }

    /// Labels by which the pods of a component are selected; they never change.
    pub(crate) fn selector(&self, component: Component) -> BTreeMap<String, String> {
        let mut labels = self.all();
        labels.insert(
            "app.kubernetes.io/component".to_owned(),
            component.name().to_owned(),
        );
        labels
    }

    /// Labels of everything of this cluster.
    pub(crate) fn all(&self) -> BTreeMap<String, String> {
        BTreeMap::from([
            ("app.kubernetes.io/name".to_owned(), "foregate".to_owned()),
            ("app.kubernetes.io/instance".to_owned(), self.name.clone()),
        ])
    }

    fn labels(&self, component: Component) -> BTreeMap<String, String> {
        let mut labels = self.selector(component);
        for (key, value) in [
            ("app.kubernetes.io/part-of", "foregate"),
            ("app.kubernetes.io/managed-by", MANAGER),
            ("app.kubernetes.io/version", env!("CARGO_PKG_VERSION")),
            ("foregate.dev/role", component.name()),
        ] {
            labels.insert(key.to_owned(), value.to_owned());
        }
        labels
    }

    pub(crate) fn meta(&self, name: String, component: Component) -> ObjectMeta {
        ObjectMeta {
            name: Some(name),
            namespace: Some(self.namespace.clone()),
            labels: Some(self.labels(component)),
            owner_references: Some(vec![self.reference()]),
            ..ObjectMeta::default()
        }
    }
}

/// `a=b,c=d`, as selectors are written.
pub(crate) fn selector_text(labels: &BTreeMap<String, String>) -> String {
    let pairs: Vec<String> = labels.iter().map(|(k, v)| format!("{k}={v}")).collect();
    pairs.join(",")
}

/// One object that is applied, of any kind.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Object {
    /// Which resource of the API it is.
    pub(crate) api: ApiResource,
    /// Its name.
    pub(crate) name: String,
    /// All of it.
    pub(crate) body: Value,
}

impl Object {
    fn of<K>(object: &K) -> Result<Self, serde_json::Error>
    where
        K: Resource<DynamicType = ()> + Serialize,
    {
        let api = ApiResource::erase::<K>(&());
        let mut body = serde_json::to_value(object)?;
        // Most types of the API do not carry these two in their fields.
        body["apiVersion"] = Value::from(api.api_version.clone());
        body["kind"] = Value::from(api.kind.clone());
        Ok(Self {
            name: object.name_any(),
            api,
            body,
        })
    }
}

/// A rank's pod with what it is compared by.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct RankPod {
    pub(crate) pod: Pod,
    /// Hash of everything that it is made from.
    pub(crate) config: String,
}

/// Everything that a cluster is made of.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Prepared {
    /// Objects that are applied as they are, in this order.
    pub(crate) objects: Vec<Object>,
    /// Pods by rank; when each is made and ended is the fleet's to say.
    pub(crate) pods: BTreeMap<Rank, RankPod>,
}

/// What the objects are built from.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Inputs<'a> {
    pub(crate) owner: &'a Owner,
    pub(crate) cluster: &'a ValidatedCluster,
    pub(crate) plan: &'a LaunchPlan,
    pub(crate) defaults: &'a Defaults,
    /// Slots of the pods that are there. A pod with more than it needs is not started anew for it.
    pub(crate) slots: &'a BTreeMap<Rank, u32>,
}

/// Everything that a cluster is made of.
///
/// # Errors
/// If a value cannot be written as JSON.
pub(crate) fn build(inputs: &Inputs<'_>) -> Result<Prepared, serde_json::Error> {
    let source = Source::of(&inputs.cluster.model);
    let mut prepared = Prepared {
        objects: Vec::new(),
        pods: BTreeMap::new(),
    };
    workers::build(inputs, &source, &mut prepared)?;
    gateways::build(inputs, &source, &mut prepared)?;
    guards::build(inputs, &mut prepared)?;
    certificates::build(inputs, &mut prepared)?;
    Ok(prepared)
}

/// A short name for a content.
fn hash(content: &[u8]) -> String {
    let hex = blake3::hash(content).to_hex();
    hex.chars().take(16).collect()
}

#[cfg(test)]
mod tests;
