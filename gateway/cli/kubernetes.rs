//! `foregate operator --kubernetes`: the operator of a Kubernetes cluster.
//!
//! Here its seams are chosen: the client of the API server, the store, and how a token is asked for. What differs from one
//! installation to another comes from flags, which the chart sets.

mod ask;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use foregate_api::tls::{ClientKeys, StoreTls};
use foregate_operator::Canary;
use foregate_operator::controller::{self, Defaults, KubeDeps};
use futures::future::BoxFuture;
use prometheus::Registry;
use serde_json::json;
use tokio_util::sync::CancellationToken;

pub(crate) use ask::{AskArgs, run as ask};

use crate::environment;
use crate::error::CliError;
use crate::roles::{self, RoleArgs};
use crate::status::{self, Probe};
use crate::telemetry::Telemetry;

/// Longest wait for a canary's token; the operator has a deadline of its own.
const TOKEN: Duration = Duration::from_secs(30);

/// Arguments of `foregate operator`: of one cluster by its node file, or of Kubernetes.
#[derive(Debug, clap::Args)]
pub(crate) struct OperatorArgs {
    /// The node file: one NodeConfig as JSON. `-` reads it as one line from stdin, and drains when stdin ends.
    #[arg(long, value_name = "NODE.json", required_unless_present = "kubernetes")]
    config: Option<PathBuf>,
    #[command(flatten)]
    kubernetes: KubernetesArgs,
}

/// Arguments of `foregate operator` on Kubernetes.
#[derive(Debug, clap::Args)]
struct KubernetesArgs {
    /// Follow the MoeCluster objects of Kubernetes: that of the pod, or that of KUBECONFIG.
    #[arg(long, requires_all = ["etcd", "image"], conflicts_with = "config")]
    kubernetes: bool,
    /// etcd where the roles of all clusters meet; pods must reach it too. Several: repeat the flag.
    #[arg(long, value_name = "URL", requires = "kubernetes")]
    etcd: Vec<String>,
    /// Certificates (PEM) of the authorities that certify etcd's servers; the URLs of --etcd are https then. Pods get
    /// these files in a Secret of their cluster.
    #[arg(long, value_name = "FILE", requires = "kubernetes")]
    etcd_ca_file: Option<PathBuf>,
    /// Certificate (PEM) that etcd is shown.
    #[arg(long, value_name = "FILE", requires_all = ["etcd_ca_file", "etcd_key_file"])]
    etcd_cert_file: Option<PathBuf>,
    /// Key (PEM) of the certificate that etcd is shown.
    #[arg(long, value_name = "FILE", requires = "etcd_cert_file")]
    etcd_key_file: Option<PathBuf>,
    /// Image of pods whose manifest names none.
    #[arg(long, value_name = "IMAGE", requires = "kubernetes")]
    image: Option<String>,
    /// Image of workers on cards whose manifest names none. Default: that of --image, which then is one for cards.
    #[arg(long, value_name = "IMAGE", requires = "kubernetes")]
    cuda_image: Option<String>,
    /// Watch this namespace only.
    #[arg(long, value_name = "NS", requires = "kubernetes")]
    namespace: Option<String>,
    /// Namespace of the Lease by which one of several operators leads.
    #[arg(
        long,
        value_name = "NS",
        default_value = "default",
        requires = "kubernetes"
    )]
    lease_namespace: String,
    /// The Deployment in that namespace that this process is of: the Lease goes with it.
    #[arg(long, value_name = "NAME", requires = "kubernetes")]
    deployment: Option<String>,
    /// Name of this process in the Lease; default: HOSTNAME, which in a pod is its name.
    #[arg(long, value_name = "NAME", requires = "kubernetes")]
    identity: Option<String>,
    /// Address of /healthz and /readyz.
    #[arg(
        long,
        value_name = "HOST:PORT",
        default_value = "0.0.0.0:8081",
        requires = "kubernetes"
    )]
    status_listen: String,
    /// Address of /metrics.
    #[arg(
        long,
        value_name = "HOST:PORT",
        default_value = "0.0.0.0:9090",
        requires = "kubernetes"
    )]
    metrics_listen: String,
}

impl KubernetesArgs {
    fn etcd_tls(&self) -> Option<StoreTls> {
        let text = |path: &PathBuf| path.to_string_lossy().into_owned();
        let ca_file = text(self.etcd_ca_file.as_ref()?);
        let client = match (&self.etcd_cert_file, &self.etcd_key_file) {
            (Some(cert), Some(key)) => Some(ClientKeys {
                cert_file: text(cert),
                key_file: text(key),
            }),
            _ => None,
        };
        Some(StoreTls { ca_file, client })
    }
}

/// Runs the operator until it is told to stop.
///
/// # Errors
/// No API server, no etcd, an address in use, a lost lead; or as any role.
pub(crate) async fn run(
    args: OperatorArgs,
    telemetry: &mut Telemetry,
    shutdown: CancellationToken,
) -> Result<(), CliError> {
    match args.config {
        Some(config) => {
            let args = RoleArgs::of(config);
            roles::run_alone("operator", &args, telemetry, shutdown).await
        }
        None => lead(args.kubernetes, telemetry, shutdown).await,
    }
}

async fn lead(
    args: KubernetesArgs,
    telemetry: &mut Telemetry,
    shutdown: CancellationToken,
) -> Result<(), CliError> {
    let failed = |what: &str| {
        let what = what.to_owned();
        move |error: foregate_operator::OperatorError| CliError::runtime(&what, &error)
    };
    let registry = Registry::new();
    telemetry.export(registry.clone());
    let client = controller::connect()
        .await
        .map_err(failed("the operator"))?;
    let etcd_tls = args.etcd_tls();
    let keys = roles::store_keys(etcd_tls.as_ref())?;
    let store = roles::connect_etcd(&args.etcd, keys.as_ref()).await?;
    let image = args.image.unwrap_or_default();
    let identity = args.identity.or_else(|| environment::variable("HOSTNAME"));
    let deps = KubeDeps {
        client,
        namespace: args.namespace,
        own_namespace: args.lease_namespace,
        deployment: args.deployment,
        identity: identity.unwrap_or_else(|| format!("operator-{}", std::process::id())),
        defaults: Defaults {
            cuda_image: args.cuda_image.unwrap_or_else(|| image.clone()),
            image,
            etcd: args.etcd,
            etcd_tls,
        },
        store,
        canary: Arc::new(OneToken::new()?),
        registry: registry.clone(),
        shutdown,
    };
    let end = CancellationToken::new();
    let mut servers = tokio::task::JoinSet::new();
    for (field, address) in [
        ("--status-listen", &args.status_listen),
        ("--metrics-listen", &args.metrics_listen),
    ] {
        let listener = roles::listen(field, address).await?;
        let registry = registry.clone();
        servers.spawn(status::serve(
            listener,
            registry,
            Probe::Operator,
            end.clone(),
        ));
    }
    let done = controller::run(deps).await;
    end.cancel();
    while servers.join_next().await.is_some() {}
    done.map_err(failed("the operator ended"))
}

/// Asks for one token over HTTP.
#[derive(Debug)]
struct OneToken {
    http: reqwest::Client,
}

impl OneToken {
    fn new() -> Result<Self, CliError> {
        let http = reqwest::Client::builder().timeout(TOKEN).build();
        let http = http.map_err(|error| CliError::runtime("HTTP client", &error))?;
        Ok(Self { http })
    }

    /// The body of a successful answer.
    async fn text(&self, url: &str, api_key: Option<&str>) -> Result<String, String> {
        let request = with_key(self.http.get(url), api_key);
        let answer = request.send().await;
        let answer = answer.map_err(|error| error.to_string())?;
        let status = answer.status();
        let text = answer.text().await.map_err(|error| error.to_string())?;
        if status.is_success() {
            Ok(text)
        } else {
            Err(format!("{url}: {status}: {text}"))
        }
    }

    async fn ask(&self, url: &str, model: &str, api_key: Option<&str>) -> Result<(), String> {
        // A prompt of one id needs no tokenizer; the token's value does not matter.
        let body = json!({ "model": model, "prompt": [0], "max_tokens": 1, "temperature": 0 });
        let request = self.http.post(format!("{url}/v1/completions")).json(&body);
        let request = with_key(request, api_key);
        let answer = request
            .send()
            .await
            .map_err(|error| error.without_url().to_string())?;
        let status = answer.status();
        let text = answer
            .text()
            .await
            .map_err(|error| error.without_url().to_string())?;
        if !status.is_success() {
            let excerpt: String = text.chars().take(200).collect();
            return Err(format!("{status}: {excerpt}"));
        }
        let value: serde_json::Value =
            serde_json::from_str(&text).map_err(|error| format!("no JSON: {error}"))?;
        match value
            .pointer("/usage/completion_tokens")
            .and_then(serde_json::Value::as_u64)
        {
            Some(1..) => Ok(()),
            _ => Err("the answer has no token".to_owned()),
        }
    }
}

fn with_key(request: reqwest::RequestBuilder, key: Option<&str>) -> reqwest::RequestBuilder {
    match key {
        Some(key) => request.bearer_auth(key),
        None => request,
    }
}

impl Canary for OneToken {
    fn token<'a>(
        &'a self,
        url: &'a str,
        model: &'a str,
        api_key: Option<&'a str>,
    ) -> BoxFuture<'a, Result<(), String>> {
        Box::pin(self.ask(url, model, api_key))
    }
}
