//! The inspector: a pod that looks at the model once, so that the operator knows its sizes without having it.
//!
//! It tells them in its termination message, which the kubelet puts into the pod's status. So a claim, an image volume and the
//! hub are all the same to the operator, which needs neither network nor disk.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Pod;

use super::{Component, Defaults, Owner, SOURCE, config};
use crate::source::Source;
use crate::validate::ValidatedCluster;

/// What is looked at, in words: the model and the formats that it is read with.
pub(crate) fn source_key(cluster: &ValidatedCluster) -> String {
    let model = &cluster.model;
    let (dtype, quantization) = (model.weights.dtype, model.weights.quantization);
    format!("{} dtype={dtype} quantization={quantization}", model.uri)
}

/// The pod.
pub(crate) fn inspector(owner: &Owner, cluster: &ValidatedCluster, defaults: &Defaults) -> Pod {
    let source = Source::of(&cluster.model);
    let weights = cluster.model.weights;
    let arguments = vec![
        "inspect".to_owned(),
        "--model".to_owned(),
        source.directory(),
        "--dtype".to_owned(),
        weights.dtype.to_string(),
        "--quantization".to_owned(),
        weights.quantization.to_string(),
        "--out".to_owned(),
        "/dev/termination-log".to_owned(),
    ];
    let image = config::image(&cluster.pods, defaults);
    let container = config::container("inspect", arguments, &cluster.pods, image);
    let mut spec = config::pod(&cluster.pods, &source, container);
    spec.restart_policy = Some("OnFailure".to_owned());
    let mut metadata = owner.meta(format!("{}-inspect", owner.name), Component::Inspector);
    let key = source_key(cluster);
    metadata.annotations = Some(BTreeMap::from([(SOURCE.to_owned(), key)]));
    Pod {
        metadata,
        spec: Some(spec),
        ..Pod::default()
    }
}
