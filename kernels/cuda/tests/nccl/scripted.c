// What NCCL does in trouble, by definitions of the compiler's command line:
//   CODE        the version it tells (default 2.28.9)
//   REDUCED     it lacks ncclAlltoAll
//   LOOKS=n     an operation is in progress for n looks; -1: for ever
//   LOST_AFTER  looks after an all-to-all say that a peer is gone
//   HANG        an abort never ends
// It counts its calls, and checks that a communicator is asked not to block.
#include <limits.h>
#include <stddef.h>
#include <unistd.h>

#ifndef CODE
#define CODE 22809
#endif
#ifndef LOOKS
#define LOOKS 0
#endif

typedef struct { char internal[128]; } Id;
typedef struct { size_t size; unsigned magic, version; int blocking, rest[5]; } ConfigHead;

static int joins_, aborts_, finalizes_, destroys_, all_to_alls_, sends_, recvs_, open_groups_, looks_;
#define COUNTER(name) int name(void) { return name##_; }
COUNTER(joins) COUNTER(aborts) COUNTER(finalizes) COUNTER(destroys)
COUNTER(all_to_alls) COUNTER(sends) COUNTER(recvs) COUNTER(open_groups)

static int handle;

int ncclGetVersion(int *version) { *version = CODE; return 0; }
const char *ncclGetErrorString(int code) { return code == 6 ? "remote process exited or there was a network error" : "an error"; }
const char *ncclGetLastError(void *comm) { (void)comm; return "a peer is gone\n"; }
int ncclGetUniqueId(Id *id) { id->internal[0] = 1; return 0; }

int ncclCommInitRankConfig(void **comm, int ranks, Id id, int rank, ConfigHead *config) {
  (void)ranks, (void)rank;
  joins_++;
  if (config->magic != 0xcafebeef || config->version < 22800 || config->blocking != 0) return 4;
  if (config->rest[0] != INT_MIN || id.internal[127] != 7) return 4;
  looks_ = LOOKS;
  *comm = &handle;
  return 7;
}

int ncclCommGetAsyncError(void *comm, int *state) {
  (void)comm;
#ifdef LOST_AFTER
  if (all_to_alls_ >= LOST_AFTER) { *state = 6; return 0; }
#endif
  *state = looks_ != 0 ? 7 : 0;
  if (looks_ > 0) looks_--;
  return 0;
}

int ncclCommFinalize(void *comm) { (void)comm; finalizes_++; looks_ = LOOKS; return 7; }
int ncclCommDestroy(void *comm) { (void)comm; if (finalizes_ == 0) return 5; destroys_++; return 0; }
int ncclCommAbort(void *comm) {
  (void)comm;
  aborts_++;
#ifdef HANG
  for (;;) pause();
#endif
  return 0;
}

int ncclGroupStart(void) { open_groups_++; return 0; }
int ncclGroupEnd(void) { open_groups_--; return 0; }
int ncclSend(const void *from, size_t count, int type, int peer, void *comm, void *stream) { sends_++; return 0; }
int ncclRecv(void *into, size_t count, int type, int peer, void *comm, void *stream) { recvs_++; return 0; }
int ncclAllReduce(const void *from, void *into, size_t count, int type, int op, void *comm, void *stream) { return 0; }
#ifndef REDUCED
int ncclAlltoAll(const void *from, void *into, size_t count, int type, void *comm, void *stream) {
  all_to_alls_++;
  return 0;
}
#endif
