//! `GET /metrics` in the text format of Prometheus.
//!
//! | module | owns |
//! |---|---|
//! | `process` | the daemon's own process |
//! | `requests` | counting and timing requests |
//! | `survey` | what each sandbox and zygote costs, looked at now and then |

mod process;
mod requests;
mod survey;

use std::sync::OnceLock;

use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use metrics::{describe_counter, describe_gauge, describe_histogram, gauge};
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};

use crate::error::ApiResult;
use crate::router::Api;

pub(crate) use requests::count;
pub(crate) use survey::Survey;

/// Upper bounds of histogram buckets, in seconds: from a native fork to an emulated boot.
const BUCKETS: [f64; 16] =
    [0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 20.0, 60.0];

/// The recorder of this process; installed once, whoever asks first.
pub(crate) fn recorder() -> &'static PrometheusHandle {
    static HANDLE: OnceLock<PrometheusHandle> = OnceLock::new();
    HANDLE.get_or_init(|| {
        let builder = PrometheusBuilder::new().set_buckets(&BUCKETS).expect("there are buckets");
        let recorder = builder.build_recorder();
        let handle = recorder.handle();
        if metrics::set_global_recorder(recorder).is_err() {
            tracing::warn!("another metrics recorder is installed; /metrics shows only what is gauged on request");
        }
        describe();
        handle
    })
}

fn describe() {
    process::describe();
    describe_gauge!("forkd_snapshots_total", "Published snapshots.");
    describe_gauge!("forkd_sandboxes_active", "Sandboxes that run.");
    describe_gauge!("forkd_branches_in_flight", "Branches under way, with those whose request has been answered.");
    describe_gauge!("forkd_branch_concurrency_cap", "The most branches that may be under way.");
    describe_gauge!("forkd_build_info", "Always 1; the label tells the version.");
    describe_counter!("forkd_children_spawned_total", "Children whose agent has answered.");
    describe_counter!("forkd_children_failed_total", "Children that did not come up.");
    describe_histogram!("forkd_spawn_answered_seconds", "From a spawn's arrival until a child's agent answered.");
    describe_histogram!("forkd_spawn_stage_seconds", "Time of each stage of a child's coming up.");
    describe_histogram!("forkd_branch_pause_seconds", "How long a branch made its source stand still.");
    describe_histogram!("forkd_branch_stage_seconds", "Time of each stage of a branch.");
    describe_counter!("forkd_http_requests_total", "Requests that were answered.");
    describe_histogram!("forkd_http_request_seconds", "From a request's header until its answer's header.");
    describe_gauge!("forkd_http_requests_in_flight", "Requests whose answer's header is not sent yet.");
    describe_counter!("forkd_requests_refused_total", "Requests that were not let in, by the code of their error.");
    describe_gauge!("forkd_connections_open", "Open connections.");
    describe_counter!("forkd_connections_evicted_total", "Silent connections that were closed for others.");
}

/// The handler.
pub(crate) async fn show(State(api): State<Api>) -> ApiResult<Response> {
    let now = api.node.gauges().await?;
    gauge!("forkd_snapshots_total").set(now.snapshots as f64);
    gauge!("forkd_sandboxes_active").set(now.sandboxes as f64);
    gauge!("forkd_branches_in_flight").set(now.branches_in_flight as f64);
    gauge!("forkd_branch_concurrency_cap").set(now.branch_cap as f64);
    gauge!("forkd_build_info", "version" => env!("CARGO_PKG_VERSION")).set(1.0);
    process::look();
    let survey = api.survey.look(&api.node).await;
    let handle = recorder();
    handle.run_upkeep();
    let mut text = handle.render();
    survey.render(&mut text);
    Ok(([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response())
}
