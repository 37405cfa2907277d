// Warp collectives: the last lane to come completes them for all.
#include <string>

#include "emulate/counts.h"
#include "emulate/races.h"
#include "emulate/scheduler.h"

namespace emulate {
namespace {

constexpr unsigned kAllLanes = 0xffffffffu;

bool same(const Thread& a, const Thread& b) {
  return a.collective == b.collective && a.site.line == b.site.line && a.site.file == b.site.file &&
         a.bytes == b.bytes;
}

// Completes the collective of the lanes in `mask`, if all of them that still run have come to it.
void complete(Block& block, int first, unsigned mask) {
  const int warp = first / kWarp;
  if (block.in_collective[warp] + block.exited[warp] < __builtin_popcount(mask)) return;
  uint64_t contribution[kWarp] = {};
  unsigned present = 0, votes = 0;
  const Thread* leader = nullptr;
  for (int l = 0; l < kWarp; ++l) {
    if (!(mask >> l & 1)) continue;
    if (first + l >= block.count) stop("a warp collective's mask names lanes beyond the block's last thread");
    const Thread& thread = block.threads[first + l];
    if (thread.state == State::kDone) continue;
    if (thread.state != State::kInWarp) return;
    if (leader && !same(*leader, thread))
      stop("lanes of one warp are in different collectives, here and in line " +
           std::to_string(leader->site.line));
    if (thread.mask != mask) stop("lanes of one warp collective disagree on its mask");
    leader = leader ? leader : &thread;
    contribution[l] = thread.bits;
    present |= 1u << l;
    votes |= static_cast<unsigned>(thread.bits != 0) << l;
  }
  if (leader && leader->collective == Collective::kGather) {
    if (present != kAllLanes) stop("lanes have exited that this warp collective needs");
    auto& buffer = block.gathered[warp];
    buffer.resize(kWarp * leader->bytes);
    for (int l = 0; l < kWarp; ++l)
      std::memcpy(buffer.data() + l * leader->bytes, block.threads[first + l].gives, leader->bytes);
  }
  for (int l = 0; l < kWarp; ++l) {
    if (!(present >> l & 1)) continue;
    Thread& thread = block.threads[first + l];
    if (thread.collective == Collective::kBallot) thread.bits = votes;
    if (thread.collective == Collective::kShuffle) {
      const int source = thread.source % kWarp;
      thread.bits =
          present >> source & 1 ? contribution[source] : ~uint64_t{0};  // an absent lane's value: NaN
    }
    --block.in_collective[warp];
    wake(thread);
  }
}

uint64_t join(Collective collective, unsigned mask, uint64_t bits, int source, Site site,
              const void* gives = nullptr, size_t bytes = 0) {
  const Unseen unseen;
  Thread& me = running();
  me.site = site;
  if (!(mask >> lane() & 1)) stop("a lane is missing from its own warp collective's mask");
  me.collective = collective;
  me.mask = mask;
  me.bits = bits;
  me.source = source;
  me.gives = gives;
  me.bytes = bytes;
  me.state = State::kInWarp;
  ++me.block->in_collective[me.index / kWarp];
  complete(*me.block, me.index - lane(), mask);
  yield();
  return me.bits;
}

}  // namespace

int lane() {
  return running().index % kWarp;
}

// The only collective that orders memory.
void warp_barrier(unsigned mask, Site site) {
  Thread& me = running();
  char* tag = &me.block->warp_tags[me.index / kWarp][me.warp_barriers++ % 2];
  release(tag);
  join(Collective::kSync, mask, 0, 0, site);
  acquire(tag);
}

unsigned ballot(unsigned mask, bool predicate, Site site) {
  return static_cast<unsigned>(join(Collective::kBallot, mask, predicate, 0, site));
}

uint64_t shuffle_bits(unsigned mask, uint64_t bits, int source, Site site) {
  return join(Collective::kShuffle, mask, bits, source, site);
}

const unsigned char* gather(const void* mine, size_t bytes, Site site) {
  count_gather(mine, site);
  join(Collective::kGather, kAllLanes, 0, 0, site, mine, bytes);
  const Thread& me = running();
  return me.block->gathered[me.index / kWarp].data();
}

void complete_warp_without(Thread& exited) {
  Block& block = *exited.block;
  const int first = exited.index - exited.index % kWarp;
  for (int i = first; i < first + kWarp && i < block.count; ++i)
    if (block.threads[i].state == State::kInWarp) {
      complete(block, first, block.threads[i].mask);
      break;
    }
}

}  // namespace emulate
