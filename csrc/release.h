// Giving the physical memory behind a dead part of a buffer back before the buffer itself is freed.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace fastmerge {

// Tells the system that the bytes [begin, end) will not be read again; reading them later gives anything.
//
// Torch shrinks a storage by copying it. Between the compaction and that copy the tail of the old memory still counts; given
// back first, old and new together never need more than the old alone where half or more was dropped. Only whole pages
// inside the range go, what the allocator keeps beside it stays. Advice the system does not take costs nothing but memory.
inline void release(std::uintptr_t begin, std::uintptr_t end) {
#if defined(__linux__)
    const auto page = static_cast<std::uintptr_t>(::sysconf(_SC_PAGESIZE));
    const std::uintptr_t first = (begin + page - 1) / page * page;
    const std::uintptr_t last = end / page * page;
    if (first < last) ::madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);
#else
    static_cast<void>(begin);
    static_cast<void>(end);
#endif
}

}  // namespace fastmerge
