//! `GET /metrics` in the text format of Prometheus.

use std::sync::OnceLock;

use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use metrics::{describe_counter, describe_gauge, describe_histogram, gauge};
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};

use crate::error::ApiResult;
use crate::router::Api;

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
        describe_gauge!("forkd_snapshots_total", "Published snapshots.");
        describe_gauge!("forkd_sandboxes_active", "Sandboxes that run.");
        describe_gauge!("forkd_branches_in_flight", "Branches under way.");
        describe_gauge!("forkd_branch_concurrency_cap", "The most branches that may be under way.");
        describe_gauge!("forkd_build_info", "Always 1; the label tells the version.");
        describe_counter!("forkd_children_spawned_total", "Children whose agent has answered.");
        describe_counter!("forkd_children_failed_total", "Children that did not come up.");
        describe_histogram!("forkd_spawn_answered_seconds", "From a spawn's arrival until a child's agent answered.");
        describe_histogram!("forkd_spawn_stage_seconds", "Time of each stage of a child's coming up.");
        handle
    })
}

/// The handler.
pub(crate) async fn show(State(api): State<Api>) -> ApiResult<Response> {
    let now = api.node.gauges().await?;
    gauge!("forkd_snapshots_total").set(now.snapshots as f64);
    gauge!("forkd_sandboxes_active").set(now.sandboxes as f64);
    gauge!("forkd_branches_in_flight").set(0.0);
    gauge!("forkd_branch_concurrency_cap").set(0.0);
    gauge!("forkd_build_info", "version" => env!("CARGO_PKG_VERSION")).set(1.0);
    let handle = recorder();
    handle.run_upkeep();
    Ok(([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], handle.render()).into_response())
}
