//! How many bytes of bodies may be held at a time: whoever holds some has a share, and a connection reads nothing more while all
//! shares are out.
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Waker;

/// What a message weighs beside its body.
const BESIDE: usize = 1024;

/// So many bytes at most, but for what is taken at once when there was room.
#[derive(Debug)]
pub struct Budget {
    most: usize,
    held: AtomicUsize,
    /// Who waits for room.
    waiting: Mutex<Vec<Waker>>,
}

/// Bytes of a budget, given back when it is dropped.
#[derive(Debug)]
pub struct Share {
    budget: Arc<Budget>,
    bytes: usize,
}

impl Budget {
    /// A budget of so many bytes.
    #[must_use]
    pub fn new(most: usize) -> Arc<Self> {
        Arc::new(Self { most, held: AtomicUsize::new(0), waiting: Mutex::default() })
    }

    /// A share for a body of so many bytes, whether there is room or not.
    #[must_use]
    pub fn take(self: &Arc<Self>, body: usize) -> Share {
        let bytes = body + BESIDE;
        self.held.fetch_add(bytes, Ordering::AcqRel);
        Share { budget: self.clone(), bytes }
    }

    /// Whether there is no room.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.held() >= self.most
    }

    /// Bytes that are held.
    #[must_use]
    pub fn held(&self) -> usize {
        self.held.load(Ordering::Acquire)
    }

    /// Whether there is room; if not, this one is woken when there is.
    pub(crate) fn has_room(&self, waker: &Waker) -> bool {
        if !self.is_full() {
            return true;
        }
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if !waiting.iter().any(|other| other.will_wake(waker)) {
            waiting.push(waker.clone());
        }
        drop(waiting);
        // It may have been given back meanwhile.
        !self.is_full()
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let before = self.budget.held.fetch_sub(self.bytes, Ordering::AcqRel);
        if before >= self.budget.most && before - self.bytes < self.budget.most {
            let waiting = std::mem::take(&mut *self.budget.waiting.lock().unwrap_or_else(PoisonError::into_inner));
            waiting.into_iter().for_each(Waker::wake);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicBool;
    use std::task::Wake;

    #[derive(Default)]
    struct Woken(AtomicBool);
    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.store(true, Ordering::Release);
        }
    }

    #[test]
    fn who_waits_is_woken_once_there_is_room() {
        let (budget, woken) = (Budget::new(3 * BESIDE), Arc::new(Woken::default()));
        let waker = Waker::from(woken.clone());
        let small = budget.take(0);
        assert!(budget.has_room(&waker));
        // Larger than all of it: there was room.
        let large = budget.take(10 * BESIDE);
        assert!(!budget.has_room(&waker) && !budget.has_room(&waker));
        drop(small);
        assert!(!woken.0.load(Ordering::Acquire), "there is none yet");
        drop(large);
        assert!(woken.0.load(Ordering::Acquire) && budget.has_room(&waker) && budget.held() == 0);
    }
}
