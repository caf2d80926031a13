//! `foregate ask`: what `helm test` runs. The operator answers, and a token comes through a gateway.

use std::time::Duration;

use serde_json::Value;
use tokio::time::{Instant, sleep};

use super::OneToken;
use crate::environment;
use crate::error::{CliError, print};

/// Pause between two attempts.
const PAUSE: Duration = Duration::from_secs(1);

/// Arguments of `foregate ask`.
#[derive(Debug, clap::Args)]
pub(crate) struct AskArgs {
    /// URL of the operator's status server.
    #[arg(long, value_name = "URL", required_unless_present = "gateway")]
    operator: Option<String>,
    /// URL of a gateway, which is asked for a token. It is shown the key in FOREGATE_API_KEY, if there is one.
    #[arg(long, value_name = "URL")]
    gateway: Option<String>,
    /// Seconds until an answer must have come.
    #[arg(long, value_name = "N", default_value_t = 60)]
    seconds: u64,
}

/// Asks until both have answered.
///
/// # Errors
/// What kept one from answering last.
pub(crate) async fn run(args: &AskArgs) -> Result<(), CliError> {
    let asker = OneToken::new()?;
    let end = Instant::now() + Duration::from_secs(args.seconds);
    loop {
        match answers(&asker, args).await {
            Ok(()) => return Ok(()),
            Err(why) if Instant::now() + PAUSE > end => return Err(CliError::Runtime(why)),
            Err(_) => sleep(PAUSE).await,
        }
    }
}

async fn answers(asker: &OneToken, args: &AskArgs) -> Result<(), String> {
    if let Some(operator) = &args.operator {
        asker
            .text(&format!("{operator}/readyz"), None)
            .await
            .map_err(|why| format!("operator: {why}"))?;
        print("the operator answers");
    }
    if let Some(gateway) = &args.gateway {
        let told = |why| format!("gateway: {why}");
        let key = environment::variable("FOREGATE_API_KEY");
        let models = asker
            .text(&format!("{gateway}/v1/models"), key.as_deref())
            .await
            .map_err(told)?;
        let models: Value = serde_json::from_str(&models).map_err(|e| told(e.to_string()))?;
        let model = models.pointer("/data/0/id").and_then(Value::as_str);
        let model = model.ok_or_else(|| told("it serves no model".to_owned()))?;
        asker
            .ask(gateway, model, key.as_deref())
            .await
            .map_err(told)?;
        print(&format!("a token of {model} came through the gateway"));
    }
    Ok(())
}
