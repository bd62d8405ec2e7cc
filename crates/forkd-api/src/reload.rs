//! Files that are read again when they change, or when somebody says so.

use std::future::Future;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::sync::watch;

/// What tells whether a file is still the same: device, inode, size, times of content and attributes.
type Stamp = Option<(u64, u64, u64, (i64, i64), (i64, i64))>;

fn stamp(path: &Path) -> Stamp {
    let meta = std::fs::metadata(path).ok()?;
    let (content, attributes) = ((meta.mtime(), meta.mtime_nsec()), (meta.ctime(), meta.ctime_nsec()));
    Some((meta.dev(), meta.ino(), meta.len(), content, attributes))
}

/// Calls `reload` whenever one of `paths` has changed, which is looked for at intervals of `every`, and whenever
/// `asked` is sent something; ends when its sender is gone. What `reload` could not do is tried again at the next change.
pub fn on_change(
    paths: &[&Path],
    every: Duration,
    mut asked: watch::Receiver<()>,
    mut reload: impl FnMut() + Send + 'static,
) -> impl Future<Output = ()> + Send + 'static {
    let paths: Vec<PathBuf> = paths.iter().map(|path| path.to_path_buf()).collect();
    let look = move || -> Vec<Stamp> { paths.iter().map(|path| stamp(path)).collect() };
    let mut seen = look();
    async move {
        let mut ticks = tokio::time::interval(every);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let was_asked = tokio::select! {
                _ = ticks.tick() => false,
                asked = asked.changed() => match asked {
                    Ok(()) => true,
                    Err(_) => return,
                },
            };
            // Before it is read: a change in between is seen the next time.
            let now = look();
            if was_asked || now != seen {
                seen = now;
                reload();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[tokio::test]
    async fn a_change_a_replacement_and_a_request_each_reload_once() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("file");
        std::fs::write(&path, "1").expect("write");
        let (ask, asked) = watch::channel(());
        let count = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&count);
        let watching = on_change(&[&path], Duration::from_millis(10), asked, move || {
            counter.fetch_add(1, Ordering::Relaxed);
        });
        let watching = tokio::spawn(watching);
        let settle = async || {
            tokio::time::sleep(Duration::from_millis(200)).await;
            count.load(Ordering::Relaxed)
        };
        assert_eq!(settle().await, 0, "nothing has changed");
        std::fs::write(&path, "2").expect("write");
        assert_eq!(settle().await, 1);
        let beside = dir.path().join("beside");
        std::fs::write(&beside, "3").expect("write");
        std::fs::rename(&beside, &path).expect("rename");
        assert_eq!(settle().await, 2);
        ask.send(()).expect("heard");
        assert_eq!(settle().await, 3);
        drop(ask);
        watching.await.expect("ends");
    }
}
