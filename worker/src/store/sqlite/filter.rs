//! A Bloom filter in blocks of a cache line: whether something may be known, at the price of one look at the memory.
use warren_shared::Identity;

/// Bits for each identity: of a thousand that are not in it, about one seems to be.
const BITS: usize = 16;
/// Places that an identity sets in its block.
const PLACES: u32 = 6;

/// A set of identities that may say yes without reason, and never says no to one that it holds.
#[derive(Debug)]
pub(super) struct Filter {
    blocks: Vec<[u64; 8]>,
}

impl Filter {
    /// A filter for so many.
    pub(super) fn with_capacity(identities: usize) -> Self {
        Self { blocks: vec![[0; 8]; (identities * BITS).div_ceil(512).next_power_of_two()] }
    }

    /// Adds an identity.
    pub(super) fn insert(&mut self, identity: &Identity) {
        let (block, places) = self.places(identity);
        for (word, bit) in places {
            self.blocks[block][word] |= bit;
        }
    }

    /// Whether it may hold an identity.
    pub(super) fn may_hold(&self, identity: &Identity) -> bool {
        let (block, mut places) = self.places(identity);
        places.all(|(word, bit)| self.blocks[block][word] & bit != 0)
    }

    /// The block, and word and bit of each place in it. Identities are hashes: their own bits are chance enough, once
    /// those that say what kind of UUID they are have been mixed away.
    fn places(&self, identity: &Identity) -> (usize, impl Iterator<Item = (usize, u64)> + use<>) {
        let (high, low) = identity.as_u64s();
        let mixed = (high ^ low.rotate_left(32)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let block = (mixed >> 20) as usize & (self.blocks.len() - 1);
        let chance = low.wrapping_mul(0xd6e8_feb8_6659_fd93) ^ high;
        let place = move |i: u32| {
            let place = (chance >> (9 * i)) as usize & 511;
            (place / 64, 1 << (place % 64))
        };
        (block, (0..PLACES).map(place))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_holds_what_it_was_given_and_little_else() {
        let identity = |i: u32| Identity::of("/filter", &i.to_string());
        let mut filter = Filter::with_capacity(20_000);
        (0..20_000).for_each(|i| filter.insert(&identity(i)));
        assert!((0..20_000).all(|i| filter.may_hold(&identity(i))));
        let wrong = (20_000..120_000).filter(|i| filter.may_hold(&identity(*i))).count();
        assert!(wrong < 400, "{wrong} of 100000 seem to be in it");
    }
}
