// Asynchronous copies: a thread's own (cp.async), and those of the copy engine, which count down an mbarrier.
#include "emulate/copies.h"

#include <string>
#include <vector>

#include "emulate/races.h"
#include "emulate/scheduler.h"

namespace emulate {
namespace {

// The bits of an mbarrier here: arrivals still expected in this phase, arrivals per phase, bytes still
// expected plus 2^30 (a copy may land before its bytes are expected), parity of the phase, and a mark that
// it was initialized.
struct Mbarrier {
  int pending, count, bytes;
  unsigned parity;
};
constexpr uint64_t kMark = 0x5;
constexpr int kManyBytes = 1 << 30;

uint64_t pack(const Mbarrier& m) {
  return static_cast<uint64_t>(m.pending) | static_cast<uint64_t>(m.count) << 14 |
         static_cast<uint64_t>(m.bytes + kManyBytes) << 28 | static_cast<uint64_t>(m.parity) << 60 |
         kMark << 61;
}

Mbarrier unpack(uint64_t word) {
  if (word >> 61 != kMark) stop("an mbarrier is used before it is initialized");
  return {static_cast<int>(word & 0x3fff), static_cast<int>(word >> 14 & 0x3fff),
          static_cast<int>(word >> 28 & 0xffffffffu) - kManyBytes, static_cast<unsigned>(word >> 60 & 1)};
}

// One address per phase for the race detector: an arrival happens before the waits for its phase only.
char* tag(uint64_t* word, unsigned parity) {
  return reinterpret_cast<char*>(word) + parity;
}

void store(uint64_t* word, Mbarrier m) {
  if (m.pending == 0 && m.bytes == 0) {
    m.pending = m.count;
    m.parity ^= 1;
    for (Thread& thread : threads)
      if (thread.state == State::kAtMbarrier && thread.mbarrier == word) wake(thread);
  }
  *word = pack(m);
}

struct BulkCopy {
  void* to;
  const void* from;
  int bytes;
  uint64_t* mbarrier;
};
std::vector<BulkCopy> under_way;

}  // namespace

void issue_copy(const Copy& copy, Site site) {
  const Unseen unseen;
  running().site = site;
  running().copies.push_back(copy);
}

void commit_copies() {
  const Unseen unseen;
  running().group_ends.push_back(running().copies.size());
}

bool next_copy(int left, Copy* copy) {
  const Unseen unseen;
  Thread& me = running();
  while (static_cast<int>(me.group_ends.size()) > left && me.group_ends.front() == 0)
    me.group_ends.pop_front();
  if (static_cast<int>(me.group_ends.size()) <= left) return false;
  *copy = me.copies.front();
  me.copies.pop_front();
  for (size_t& end : me.group_ends)
    --end;
  return true;
}

void mbarrier_init(uint64_t* word, unsigned count, Site site) {
  const Unseen unseen;
  running().site = site;
  if (count == 0 || count > 1024) stop("an mbarrier for no thread, or for more than a block has");
  *word = pack({static_cast<int>(count), static_cast<int>(count), 0, 0});
}

void mbarrier_arrive(uint64_t* word, unsigned expected_bytes, Site site) {
  unsigned parity;
  {
    const Unseen unseen;
    running().site = site;
    parity = unpack(*word).parity;
  }
  release(tag(word, parity));
  const Unseen unseen;
  Mbarrier m = unpack(*word);
  if (m.pending == 0) stop("more arrivals at an mbarrier than it was initialized for");
  --m.pending;
  m.bytes += static_cast<int>(expected_bytes);
  store(word, m);
}

void mbarrier_wait(uint64_t* word, unsigned parity, Site site) {
  {
    const Unseen unseen;
    Thread& me = running();
    me.site = site;
    while (unpack(*word).parity == parity % 2) {
      me.mbarrier = word;
      me.state = State::kAtMbarrier;
      yield();
    }
  }
  acquire(tag(word, parity % 2));
}

void issue_bulk_copy(void* to, const void* from, int bytes, uint64_t* mbarrier, Site site) {
  unsigned parity;
  {
    const Unseen unseen;
    running().site = site;
    parity = unpack(*mbarrier).parity;
    under_way.push_back({to, from, bytes, mbarrier});
  }
  release(tag(mbarrier, parity));
}

bool land_bulk_copy() {
  if (under_way.empty()) return false;
  const Order order = current_schedule().order;
  const size_t which = order == Order::kSequential ? 0
                       : order == Order::kReversed ? under_way.size() - 1
                                                   : random_number() % under_way.size();
  const BulkCopy copy = under_way[which];
  under_way.erase(under_way.begin() + static_cast<std::ptrdiff_t>(which));
  std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.bytes));
  Mbarrier m = unpack(*copy.mbarrier);
  m.bytes -= copy.bytes;
  store(copy.mbarrier, m);
  return true;
}

bool bulk_copies_under_way() {
  return !under_way.empty();
}

void forget_bulk_copies() {
  under_way.clear();
}

}  // namespace emulate
