// What NCCL does between cards, between threads of one process whose devices are memory of this process.
//
// Ranks find each other by the unique id. What a rank sends is copied when both it and its receiver have put the operation
// on their streams; a stream is a counter of operations that it has not passed. As with communicators that do not block, an
// operation comes to the stream only when the error state has been asked for often enough. A rank that is gone tells nobody,
// as over shared memory, unless TELL is defined: then the others see a remote error, as over a network.
#include <limits.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, INVALID_ARGUMENT = 4, INVALID_USAGE = 5, REMOTE_ERROR = 6, IN_PROGRESS = 7 };
// Looks at the error state that an operation takes to come to its stream.
enum { LOOKS = 2 };

typedef struct { char internal[128]; } Id;
typedef struct { size_t size; unsigned magic, version; int blocking, rest[5]; } ConfigHead;
typedef atomic_int Stream;

// One direction of an operation.
typedef struct Part {
  struct Part *next;
  struct Comm *owner;
  char *at;
  size_t bytes;
  int sends, peer;
  Stream *stream;
} Part;

typedef struct Group {
  struct Group *next;
  Id id;
  int ranks, joined, finalized, lost;
  struct Comm *comms[64];
} Group;

typedef struct Comm {
  Group *group;
  int rank, looks, error, finalizing;
  Part *handed_over; // not on the stream yet, in order
  Part *waiting;     // on the stream, in order
} Comm;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static Group *groups;
static unsigned ids;
static _Thread_local int depth;
static _Thread_local Part *held;

static void append(Part **list, Part *part) {
  while (*list) list = &(*list)->next;
  part->next = NULL;
  *list = part;
}

static Part *take(Part **list, int sends, int peer) {
  for (; *list; list = &(*list)->next)
    if ((*list)->sends == sends && (*list)->peer == peer) {
      Part *part = *list;
      *list = part->next;
      return part;
    }
  return NULL;
}

static void drop(Part **list) {
  while (*list) {
    Part *part = *list;
    *list = part->next;
    free(part);
  }
}

static void pass(Part *part) {
  atomic_fetch_sub(part->stream, 1);
  free(part);
}

// A part comes to its stream: it meets its other half, or waits for it.
static void arrive(Comm *comm, Part *part) {
  Comm *peer = comm->group->comms[part->peer];
  Part *half = peer ? take(&peer->waiting, !part->sends, comm->rank) : NULL;
  if (!half) return append(&comm->waiting, part);
  if (half->bytes != part->bytes) {
    comm->error = peer->error = INVALID_USAGE;
    append(&comm->waiting, part), append(&peer->waiting, half);
    return;
  }
  memcpy(part->sends ? half->at : part->at, part->sends ? part->at : half->at, part->bytes);
  pass(part), pass(half);
}

static size_t width(int type) {
  switch (type) {
    case 1: return 1;
    case 6: case 9: return 2;
    case 3: case 7: return 4;
    case 5: return 8;
    default: return 0;
  }
}

static int hand_over(Comm *comm, int sends, const void *at, size_t count, int type, int peer, void *stream) {
  if (!stream || !width(type) || peer < 0 || peer >= comm->group->ranks) return INVALID_ARGUMENT;
  Part *part = calloc(1, sizeof *part);
  *part = (Part){NULL, comm, (char *)at, count * width(type), sends, peer, stream};
  append(&held, part);
  return SUCCESS;
}

int ncclGetVersion(int *version) { *version = 22809; return SUCCESS; }
const char *ncclGetLastError(void *comm) { (void)comm; return ""; }
const char *ncclGetErrorString(int code) {
  switch (code) {
    case INVALID_ARGUMENT: return "invalid argument";
    case INVALID_USAGE: return "invalid usage";
    case REMOTE_ERROR: return "remote process exited or there was a network error";
    default: return "no error";
  }
}

int ncclGetUniqueId(Id *id) {
  memset(id, 0, sizeof *id);
  pthread_mutex_lock(&lock);
  unsigned number = ++ids;
  pthread_mutex_unlock(&lock);
  memcpy(id->internal, &number, sizeof number);
  id->internal[127] = 7;
  return SUCCESS;
}

int ncclCommInitRankConfig(void **made, int ranks, Id id, int rank, ConfigHead *config) {
  if (config->magic != 0xcafebeef || config->version < 22800 || config->blocking != 0) return INVALID_ARGUMENT;
  if (ranks < 1 || ranks > 64 || rank < 0 || rank >= ranks || id.internal[127] != 7) return INVALID_ARGUMENT;
  pthread_mutex_lock(&lock);
  Group *group = groups;
  while (group && memcmp(&group->id, &id, sizeof id)) group = group->next;
  if (!group) {
    group = calloc(1, sizeof *group);
    group->id = id, group->ranks = ranks, group->next = groups, groups = group;
  }
  int code = INVALID_USAGE;
  if (group->ranks == ranks && !group->comms[rank]) {
    Comm *comm = calloc(1, sizeof *comm);
    comm->group = group, comm->rank = rank;
    group->comms[rank] = comm, group->joined++;
    *made = comm, code = IN_PROGRESS;
  }
  pthread_mutex_unlock(&lock);
  return code;
}

int ncclCommGetAsyncError(void *handle, int *state) {
  Comm *comm = handle;
  Group *group = comm->group;
  pthread_mutex_lock(&lock);
  *state = SUCCESS;
#ifdef TELL
  if (group->lost) comm->error = REMOTE_ERROR;
#endif
  if (comm->error) *state = comm->error;
  else if (group->joined < group->ranks || (comm->finalizing && group->finalized < group->ranks)) *state = IN_PROGRESS;
  else if (comm->handed_over && comm->looks-- > 0) *state = IN_PROGRESS;
  else {
    Part *part = comm->handed_over;
    comm->handed_over = NULL;
    for (Part *each = part; each; each = each->next) atomic_fetch_add(each->stream, 1);
    while (part) {
      Part *next = part->next;
      arrive(comm, part);
      part = next;
    }
  }
  pthread_mutex_unlock(&lock);
  return SUCCESS;
}

static void leave(Comm *comm) {
  drop(&comm->handed_over);
  while (comm->waiting) {
    Part *part = comm->waiting;
    comm->waiting = part->next;
    pass(part);
  }
  comm->group->comms[comm->rank] = NULL;
  free(comm);
}

int ncclCommFinalize(void *handle) {
  Comm *comm = handle;
  pthread_mutex_lock(&lock);
  comm->finalizing = 1, comm->group->finalized++;
  pthread_mutex_unlock(&lock);
  return IN_PROGRESS;
}

int ncclCommDestroy(void *handle) {
  Comm *comm = handle;
  pthread_mutex_lock(&lock);
  int code = comm->finalizing ? SUCCESS : INVALID_USAGE;
  if (code == SUCCESS) leave(comm);
  pthread_mutex_unlock(&lock);
  return code;
}

int ncclCommAbort(void *handle) {
  Comm *comm = handle;
  pthread_mutex_lock(&lock);
  Group *group = comm->group;
  group->lost = 1;
  // Who gave up while others still came does not come any more.
  if (group->joined < group->ranks) group->joined = INT_MIN / 2;
  leave(comm);
  pthread_mutex_unlock(&lock);
  return SUCCESS;
}

int ncclGroupStart(void) { depth++; return SUCCESS; }

int ncclGroupEnd(void) {
  if (depth == 0) return INVALID_USAGE;
  if (--depth > 0) return SUCCESS;
  Part *part = held;
  held = NULL;
  if (!part) return SUCCESS;
  pthread_mutex_lock(&lock);
  while (part) {
    Part *next = part->next;
    part->owner->looks = LOOKS;
    append(&part->owner->handed_over, part);
    part = next;
  }
  pthread_mutex_unlock(&lock);
  return IN_PROGRESS;
}

// Outside of a group a send would wait for a receive that comes after it.
int ncclSend(const void *from, size_t count, int type, int peer, void *comm, void *stream) {
  return depth ? hand_over(comm, 1, from, count, type, peer, stream) : INVALID_USAGE;
}

int ncclRecv(void *into, size_t count, int type, int peer, void *comm, void *stream) {
  return depth ? hand_over(comm, 0, into, count, type, peer, stream) : INVALID_USAGE;
}

int ncclAlltoAll(const void *from, void *into, size_t count, int type, void *handle, void *stream) {
  Comm *comm = handle;
  size_t block = count * width(type);
  ncclGroupStart();
  int code = SUCCESS;
  for (int peer = 0; peer < comm->group->ranks && code == SUCCESS; peer++) {
    code = hand_over(comm, 1, (const char *)from + peer * block, count, type, peer, stream);
    if (code == SUCCESS) code = hand_over(comm, 0, (char *)into + peer * block, count, type, peer, stream);
  }
  if (code != SUCCESS) drop(&held);
  int end = ncclGroupEnd();
  return code != SUCCESS ? code : end;
}

// Nobody reduces over this library.
int ncclAllReduce(const void *from, void *into, size_t count, int type, int op, void *comm, void *stream) {
  (void)from, (void)into, (void)count, (void)type, (void)op, (void)comm, (void)stream;
  return INVALID_USAGE;
}
