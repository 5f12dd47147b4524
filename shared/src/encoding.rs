//! Bodies that come compressed: opened, within the limit of a body.
use crate::event::{Unreadable, excerpt};
use flate2::read::MultiGzDecoder;
use flate2::{Decompress, FlushDecompress, Status};
use std::borrow::Cow;
use std::io::Read;

/// What publishers also call a body that is not compressed: most name the encoding of its text.
const PLAIN: [&str; 8] = ["", "identity", "utf-8", "utf8", "us-ascii", "ascii", "binary", "8bit"];
/// 8 MiB: what RFC 9659 allows a sender to ask of a receiver.
const ZSTD_WINDOW_LOG: u32 = 23;
/// Bytes that are decompressed at once.
const STEP: usize = 64 << 10;

/// How a body is encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Coding {
    /// It stands as it is.
    Plain,
    Gzip,
    Deflate,
    Zstd,
    /// Nobody here knows; it is read as it stands, and named.
    Unknown,
}

impl Coding {
    /// By `content_encoding`.
    pub(crate) fn of(name: &str) -> Self {
        let name = name.trim().to_ascii_lowercase();
        match name.as_str() {
            "gzip" | "x-gzip" => Self::Gzip,
            "deflate" => Self::Deflate,
            "zstd" => Self::Zstd,
            name if PLAIN.contains(&name) => Self::Plain,
            _ => Self::Unknown,
        }
    }

    /// The body without it.
    ///
    /// # Errors
    /// The body is not encoded so, or has more than `limit` bytes inside.
    pub(crate) fn decoded(self, body: &[u8], limit: usize) -> Result<Cow<'_, [u8]>, Unreadable> {
        // Some publishers name an encoding where there is nothing to encode.
        if body.is_empty() {
            return Ok(body.into());
        }
        let most = u64::try_from(limit).unwrap_or(u64::MAX).saturating_add(1);
        let mut out = Vec::new();
        let (name, ended) = match self {
            Self::Plain | Self::Unknown => return Ok(body.into()),
            Self::Gzip => ("gzip", MultiGzDecoder::new(body).take(most).read_to_end(&mut out).is_ok()),
            Self::Zstd => ("zstd", zstd(body, most, &mut out).is_ok()),
            Self::Deflate => ("deflate", inflate(body, limit, &mut out)),
        };
        if out.len() > limit {
            return Err(Unreadable::TooLargeInside(limit));
        }
        if !ended {
            return Err(Unreadable::Encoding(format!(
                "the body is not {name}, as its content encoding says, or cut short"
            )));
        }
        Ok(out.into())
    }
}

/// Why a body in an unknown encoding cannot be read as it stands.
pub(crate) fn unknown(name: &str, why: &Unreadable) -> Unreadable {
    let name = excerpt(name);
    Unreadable::Encoding(format!(
        "the content encoding '{name}' is not read, only gzip, deflate and zstd, and as it stands {why}"
    ))
}

fn zstd(body: &[u8], most: u64, out: &mut Vec<u8>) -> std::io::Result<usize> {
    let mut decoder = zstd::stream::read::Decoder::with_buffer(body)?;
    decoder.window_log_max(ZSTD_WINDOW_LOG)?;
    decoder.take(most).read_to_end(out)
}

/// `deflate` is zlib by the standard, and without zlib's head by habit. Whether all of it was there.
fn inflate(body: &[u8], limit: usize, out: &mut Vec<u8>) -> bool {
    let has_head = matches!(body, [a, b, ..] if a & 0x0f == 8 && (u16::from(*a) << 8 | u16::from(*b)) % 31 == 0);
    let mut inflating = Decompress::new(has_head);
    while out.len() <= limit {
        let read = usize::try_from(inflating.total_in()).unwrap_or(usize::MAX);
        let Some(rest) = body.get(read..) else { return false };
        let (before, length) = (inflating.total_in(), out.len());
        out.reserve(STEP);
        match inflating.decompress_vec(rest, out, FlushDecompress::None) {
            Ok(Status::StreamEnd) => return inflating.total_in() == body.len() as u64,
            Ok(_) if inflating.total_in() > before || out.len() > length => {}
            _ => return false,
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;
    use flate2::Compression;
    use std::io::Write;

    fn gzip(data: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), Compression::best());
        encoder.write_all(data).and_then(|()| encoder.finish()).expect("written")
    }

    fn zlib(data: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::ZlibEncoder::new(Vec::new(), Compression::best());
        encoder.write_all(data).and_then(|()| encoder.finish()).expect("written")
    }

    fn raw(data: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::DeflateEncoder::new(Vec::new(), Compression::best());
        encoder.write_all(data).and_then(|()| encoder.finish()).expect("written")
    }

    fn zstd(data: &[u8]) -> Vec<u8> {
        ::zstd::encode_all(data, 3).expect("written")
    }

    type Encode = fn(&[u8]) -> Vec<u8>;
    const ALL: [(&str, Encode); 5] =
        [("gzip", gzip), ("X-GZIP", gzip), ("deflate", zlib), (" Deflate ", raw), ("zstd", zstd)];

    #[test]
    fn what_was_compressed_is_read_up_to_the_limit_and_not_beyond() {
        let data: Vec<u8> = (0..200_000_u32).map(|i| (i / 7) as u8).collect();
        for (name, encode) in ALL {
            let (coding, body) = (Coding::of(name), encode(&data));
            assert_eq!(coding.decoded(&body, data.len()).expect(name), data, "{name}");
            let refused = coding.decoded(&body, data.len() - 1).expect_err(name);
            assert_eq!(
                (refused.reason(), refused),
                ("too-large", Unreadable::TooLargeInside(data.len() - 1)),
                "{name}"
            );
            assert!(coding.decoded(&[], 10).expect("nothing").is_empty(), "{name}");
        }
    }

    #[test]
    fn a_few_bytes_that_hold_gigabytes_take_no_more_memory_than_the_limit() {
        let zeros = vec![0; 64 << 20];
        for (name, encode) in ALL {
            let body = encode(&zeros);
            assert!(body.len() < 1 << 20);
            assert_eq!(Coding::of(name).decoded(&body, 1 << 20), Err(Unreadable::TooLargeInside(1 << 20)), "{name}");
        }
        // A window of 2 GiB is asked for in the frame's head.
        let greedy = [0x28, 0xb5, 0x2f, 0xfd, 0x00, 0xa8, 0x01, 0x00, 0x00];
        assert_eq!(Coding::Zstd.decoded(&greedy, 1 << 20).expect_err("too greedy").reason(), "bad-encoding");
    }

    #[test]
    fn what_is_cut_short_changed_or_followed_by_more_is_refused() {
        for (name, encode) in ALL {
            let (coding, body) = (Coding::of(name), encode(b"{\"a\": [1, 2, 3, 4, 5, 6, 7]}"));
            for length in 1..body.len() {
                let cut = coding.decoded(&body[..length], 1000);
                assert_eq!(cut.map_err(|e| e.reason()), Err("bad-encoding"), "{name} cut at {length}");
            }
            let more = [&body[..], b"more"].concat();
            assert_eq!(coding.decoded(&more, 1000).map_err(|e| e.reason()), Err("bad-encoding"), "{name} with more");
            assert!(coding.decoded(b"{\"a\": 1}", 1000).is_err(), "{name} that is none");
        }
    }

    #[test]
    fn several_members_one_after_the_other_are_one_body() {
        for encode in [gzip as Encode, zstd] {
            let body = [encode(b"[1,"), encode(b"2]")].concat();
            let coding = if body.starts_with(&[0x1f]) { Coding::Gzip } else { Coding::Zstd };
            assert_eq!(coding.decoded(&body, 100).expect("both"), &b"[1,2]"[..]);
        }
    }

    #[test]
    fn the_encoding_of_text_is_none_of_the_body() {
        for name in ["utf-8", "UTF-8", "identity", "binary", ""] {
            assert_eq!(Coding::of(name), Coding::Plain, "{name}");
        }
        assert_eq!(Coding::of("br"), Coding::Unknown);
        assert_eq!(Coding::of("gzip, br"), Coding::Unknown);
    }
}
