//! Programs whose streams are carried while they run; the messages are those of [`ExecStreamRequest`]'s module.
//!
//! Nothing is buffered but what is in sockets: a client that does not read holds its program up, a program that does
//! not read holds its client up. When the client goes, its connection to the agent goes with it, and the agent
//! kills the process group unless the program was to run detached.

use std::convert::Infallible;
use std::time::Duration;

use axum::body::Body;
use axum::extract::State;
use axum::extract::ws::rejection::WebSocketUpgradeRejection;
use axum::extract::ws::{CloseFrame, Message, WebSocket, WebSocketUpgrade, close_code};
use axum::http::{HeaderMap, header};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::{BufMut, Bytes, BytesMut};
use forkd_node::{ANSWER_GRACE, GuestError, InUse, Program, ProgramEvent, ProgramInput, ProgramOutput};
use forkd_proto::agent::{Exec, ExecControl, TerminalSize};
use forkd_types::SandboxId;
use forkd_types::rest::{
    ExecStreamControl, ExecStreamEvent, ExecStreamRequest, PtySize, STDERR_CHANNEL, STDIN_CHANNEL, STDOUT_CHANNEL,
};
use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt, Stream, StreamExt};
use tokio::time::Instant;

use crate::error::{ApiError, ApiResult};
use crate::extract::Json;
use crate::router::{Api, Segment};

/// The largest message of a client.
const MESSAGE_LIMIT: usize = 4 << 20;

/// How long a client may take to say what to run.
const START_LIMIT: Duration = Duration::from_secs(30);

/// How often a silent socket is shown to be alive, to it and to whatever lies between.
const PING_EVERY: Duration = Duration::from_secs(30);

/// What the errors of a running program are called.
const WHAT: &str = "exec";

/// `GET /v1/sandboxes/:id/exec/stream`, a WebSocket.
pub(crate) async fn socket(
    State(api): State<Api>,
    segment: Segment,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> ApiResult<Response> {
    let id = segment.sandbox()?;
    api.check_sandbox(&id)?;
    let Ok(upgrade) = upgrade else { return Ok(ApiError::upgrade_required("websocket")) };
    let upgrade = upgrade.max_message_size(MESSAGE_LIMIT).max_frame_size(MESSAGE_LIMIT);
    Ok(upgrade.on_upgrade(move |socket| converse(api, id, socket)))
}

/// `POST /v1/sandboxes/:id/exec/stream`: events as lines of JSON, or as server-sent events.
pub(crate) async fn events(
    State(api): State<Api>,
    segment: Segment,
    headers: HeaderMap,
    Json(request): Json<ExecStreamRequest>,
) -> ApiResult<Response> {
    let id = segment.sandbox()?;
    if request.stdin {
        let message = "stdin is true; only the WebSocket of this path carries standard input";
        return Err(ApiError::bad_request("bad_field", message));
    }
    let timeout = request.timeout_secs;
    let in_use = api.in_use(&id)?;
    let mut program = start(&api, &id, request).await?;
    // A program that does not start is an error of the request.
    let first = match next(&mut program.0, deadline(Some(START_LIMIT.as_secs()))).await {
        Ok(event) => event,
        Err(error) => return Err(api.guest_error(&id, WHAT, error).await),
    };
    let events = told(api, id, (program, in_use), first, deadline(timeout));
    let accepts = headers.get(header::ACCEPT).and_then(|value| value.to_str().ok()).unwrap_or_default();
    if accepts.contains("text/event-stream") {
        let events = events.map(|event| {
            let sse = Event::default().event(name(&event));
            Ok::<_, Infallible>(sse.data(crate::json_lines::text(&event)))
        });
        return Ok(Sse::new(events).keep_alive(KeepAlive::default()).into_response());
    }
    let lines = events.map(|event| Ok::<_, Infallible>(Bytes::from(crate::json_lines::text(&event) + "\n")));
    Ok(([(header::CONTENT_TYPE, "application/x-ndjson")], Body::from_stream(lines)).into_response())
}

/// Starts the program; that it runs, or why not, its output says.
async fn start(api: &Api, id: &SandboxId, request: ExecStreamRequest) -> ApiResult<Program> {
    let connection = api.agent(id, true).await?;
    match connection.start(exec_of(request)).await {
        Ok(program) => Ok(program),
        Err(error) => Err(api.guest_error(id, WHAT, error).await),
    }
}

fn exec_of(request: ExecStreamRequest) -> Exec {
    let ExecStreamRequest { args, env, cwd, user, timeout_secs, pty, stdin, detach } = request;
    let timeout_ms = timeout_secs.map(|seconds| seconds.saturating_mul(1000));
    Exec { args, env, cwd, user, timeout_ms, stdin, terminal: pty.map(size), detach }
}

fn size(pty: PtySize) -> TerminalSize {
    TerminalSize { rows: pty.rows, columns: pty.cols }
}

/// When the guest counts as silent, for a program of this time limit.
fn deadline(timeout_secs: Option<u64>) -> Option<(Instant, Duration)> {
    let limit = Duration::from_secs(timeout_secs?).saturating_add(ANSWER_GRACE);
    Some((Instant::now().checked_add(limit)?, limit))
}

/// What the program does next, unless it is silent beyond `deadline`.
async fn next(output: &mut ProgramOutput, deadline: Option<(Instant, Duration)>) -> Result<ProgramEvent, GuestError> {
    match deadline {
        None => output.next().await,
        Some((at, limit)) => {
            let late = |_| GuestError::TimedOut { what: "report the end of the program", limit };
            tokio::time::timeout_at(at, output.next()).await.map_err(late)?
        }
    }
}

/// Every event of a program from `first` on. Dropped, it ends the program, unless that runs detached; so long its
/// sandbox is in use.
fn told(
    api: Api,
    id: SandboxId,
    (program, in_use): (Program, Option<InUse>),
    first: ProgramEvent,
    deadline: Option<(Instant, Duration)>,
) -> impl Stream<Item = ExecStreamEvent> + Send {
    // The input is kept: without it the agent takes its client for gone.
    let begin = (program, Some(first), false);
    futures_util::stream::unfold(begin, move |(mut program, first, over)| {
        let (api, id) = (api.clone(), id.clone());
        let _held = &in_use;
        async move {
            if over {
                return None;
            }
            let event = match first {
                Some(event) => Ok(event),
                None => next(&mut program.0, deadline).await,
            };
            let event = match event {
                Ok(event) => in_text(event),
                Err(error) => failed(api.guest_error(&id, WHAT, error).await),
            };
            let over = matches!(event, ExecStreamEvent::Exit { .. } | ExecStreamEvent::Error { .. });
            Some((event, (program, None, over)))
        }
    })
}

fn in_text(event: ProgramEvent) -> ExecStreamEvent {
    match event {
        ProgramEvent::Started { pid } => ExecStreamEvent::Started { pid },
        ProgramEvent::Stdout(bytes) => ExecStreamEvent::Stdout { data: BASE64.encode(bytes) },
        ProgramEvent::Stderr(bytes) => ExecStreamEvent::Stderr { data: BASE64.encode(bytes) },
        ProgramEvent::Exited(exited) => ExecStreamEvent::Exit { code: exited.code, timed_out: exited.timed_out },
    }
}

fn failed(error: ApiError) -> ExecStreamEvent {
    let (error, code) = error.into_parts();
    ExecStreamEvent::Error { error, code: code.to_owned() }
}

fn name(event: &ExecStreamEvent) -> &'static str {
    match event {
        ExecStreamEvent::Started { .. } => "started",
        ExecStreamEvent::Stdout { .. } => "stdout",
        ExecStreamEvent::Stderr { .. } => "stderr",
        ExecStreamEvent::Exit { .. } => "exit",
        ExecStreamEvent::Error { .. } => "error",
    }
}

type Sink = SplitSink<WebSocket, Message>;

/// The whole life of a socket.
async fn converse(api: Api, id: SandboxId, socket: WebSocket) {
    let (mut sink, mut stream) = socket.split();
    // A last message that cannot be sent has nobody to read it.
    let _ = match run(&api, &id, &mut sink, &mut stream).await {
        Ended::Told(event) => finish(&mut sink, &event, close_code::NORMAL).await,
        Ended::Failed(error) => finish(&mut sink, &failed(error), close_code::ERROR).await,
        Ended::Gone => Ok(()),
    };
}

/// How a conversation ended.
enum Ended {
    /// With the program, and this is left to say.
    Told(ExecStreamEvent),
    /// With an error.
    Failed(ApiError),
    /// The client went.
    Gone,
}

async fn run(api: &Api, id: &SandboxId, sink: &mut Sink, stream: &mut SplitStream<WebSocket>) -> Ended {
    let request = match tokio::time::timeout(START_LIMIT, first(stream)).await {
        Ok(Ok(Some(request))) => request,
        Ok(Ok(None)) => return Ended::Gone,
        Ok(Err(error)) => return Ended::Failed(error),
        Err(_) => return Ended::Failed(bad_message(format!("no request came within {} s", START_LIMIT.as_secs()))),
    };
    let deadline = deadline(request.timeout_secs);
    let _in_use = match api.in_use(id) {
        Ok(in_use) => in_use,
        Err(error) => return Ended::Failed(error),
    };
    let (mut output, mut input) = match start(api, id, request).await {
        Ok(program) => program,
        Err(error) => return Ended::Failed(error),
    };
    let outcome = tokio::select! {
        ended = send(sink, &mut output, deadline) => ended,
        wrong = receive(stream, &mut input) => return wrong.map_or(Ended::Gone, Ended::Failed),
    };
    match outcome {
        Ok(Some(event)) => Ended::Told(event),
        Ok(None) => Ended::Gone,
        Err(error) => Ended::Failed(api.guest_error(id, WHAT, error).await),
    }
}

/// What the client wants to run; none when it went instead.
async fn first(stream: &mut SplitStream<WebSocket>) -> ApiResult<Option<ExecStreamRequest>> {
    loop {
        match stream.next().await {
            Some(Ok(Message::Text(text))) => {
                let request = serde_json::from_str(&text);
                return request.map(Some).map_err(|error| bad_message(format!("the first message: {error}")));
            }
            Some(Ok(Message::Binary(_))) => {
                return Err(bad_message("the first message must be text: what to run, as JSON"));
            }
            Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
            Some(Ok(Message::Close(_)) | Err(_)) | None => return Ok(None),
        }
    }
}

fn bad_message(message: impl Into<String>) -> ApiError {
    ApiError::bad_request("bad_message", message)
}

/// Tells the client what the program does, up to its end; none when the client went.
async fn send(
    sink: &mut Sink,
    output: &mut ProgramOutput,
    deadline: Option<(Instant, Duration)>,
) -> Result<Option<ExecStreamEvent>, GuestError> {
    let mut pings = tokio::time::interval_at(Instant::now() + PING_EVERY, PING_EVERY);
    pings.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        let message = tokio::select! {
            event = next(output, deadline) => match event? {
                ProgramEvent::Stdout(bytes) => on_channel(STDOUT_CHANNEL, &bytes),
                ProgramEvent::Stderr(bytes) => on_channel(STDERR_CHANNEL, &bytes),
                event @ ProgramEvent::Started { .. } => Message::Text(crate::json_lines::text(&in_text(event)).into()),
                event @ ProgramEvent::Exited(_) => return Ok(Some(in_text(event))),
            },
            _ = pings.tick() => Message::Ping(Bytes::new()),
        };
        if sink.send(message).await.is_err() {
            return Ok(None);
        }
    }
}

fn on_channel(channel: u8, bytes: &[u8]) -> Message {
    let mut message = BytesMut::with_capacity(bytes.len() + 1);
    message.put_u8(channel);
    message.put_slice(bytes);
    Message::Binary(message.freeze())
}

/// Hands on what the client says. Ends when it goes, or says what is no message.
async fn receive(stream: &mut SplitStream<WebSocket>, input: &mut ProgramInput) -> Option<ApiError> {
    while let Some(Ok(message)) = stream.next().await {
        let handed_on = match message {
            Message::Binary(bytes) => match bytes.split_first() {
                Some((&STDIN_CHANNEL, [])) => input.close().await,
                Some((&STDIN_CHANNEL, bytes)) => input.write(bytes).await,
                _ => return Some(bad_message("a binary message must start with byte 0, that of standard input")),
            },
            Message::Text(text) => match serde_json::from_str(&text) {
                Ok(control) => match obey(control, input).await {
                    Ok(handed_on) => handed_on,
                    Err(error) => return Some(error),
                },
                Err(error) => return Some(bad_message(format!("a control message: {error}"))),
            },
            Message::Ping(_) | Message::Pong(_) => Ok(()),
            Message::Close(_) => return None,
        };
        if handed_on.is_err() {
            // The program's end, or why it was lost, comes by the other direction.
            std::future::pending::<()>().await;
        }
    }
    None
}

async fn obey(control: ExecStreamControl, input: &mut ProgramInput) -> ApiResult<Result<(), GuestError>> {
    Ok(match control {
        ExecStreamControl::Stdin { data } => {
            let bytes = BASE64.decode(data).map_err(|error| bad_message(format!("stdin is not base64: {error}")))?;
            input.write(&bytes).await
        }
        ExecStreamControl::StdinClose => input.close().await,
        ExecStreamControl::Resize(pty) => input.control(ExecControl::Resize(size(pty))).await,
        ExecStreamControl::Signal { signal } => {
            let signal = signal.number().ok_or_else(|| {
                bad_message(format!("{signal:?} is no signal; give its number, or a name such as TERM"))
            })?;
            input.control(ExecControl::Signal { signal }).await
        }
    })
}

async fn finish(sink: &mut Sink, event: &ExecStreamEvent, code: u16) -> Result<(), axum::Error> {
    sink.send(Message::Text(crate::json_lines::text(event).into())).await?;
    sink.send(Message::Close(Some(CloseFrame { code, reason: "".into() }))).await
}
