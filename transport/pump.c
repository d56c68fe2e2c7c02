/* Runs of large records in C: many sealed in one call, and a thread that moves records between sockets and memory.
 * pump.py says what each function does; records.py does the same in Python, with the same bytes on the wire.
 *
 * The thread of a Pump never holds the GIL and touches no object of Python: a job has all that it needs in plain C, and
 * its buffers stay locked by their Py_buffer until Python has taken the job back. Every length is checked against them
 * first. A job is looked at by the thread or by Python, never by both: `lock` guards who, see `active`. Nothing that
 * was received is looked at before its tag is verified, and nothing is counted before its body's tag is, too. The
 * ciphers are libsodium's own functions, whose addresses come from PyNaCl.
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#ifndef MSG_NOSIGNAL
#define MSG_NOSIGNAL 0 /* Python ignores SIGPIPE anyway */
#endif

enum { REVISION = 2 };     /* of what the functions do; pump.py expects the same */
enum { HEADER = 4 };       /* the length before a record */
enum { MOST_JOBS = 64 };   /* records of one call */
enum { STEP = 1 << 20 };   /* bytes of one job before the others have their turn */
enum { MOST_NONCE = 32 };  /* bytes of the longest nonce of a suite */
enum { MOST_TAG = 32 };
enum { SPLIT_HEAD = 22 };  /* head of a split record of one DATA frame: that of the session (13), that of the mux (9) */
enum { BULK = 1, DATA = 2 };

typedef unsigned long long ull;
typedef int (*encrypt_fn)(unsigned char *c, ull *clen, const unsigned char *m, ull mlen, const unsigned char *ad,
                          ull adlen, const unsigned char *nsec, const unsigned char *npub, const unsigned char *k);
typedef int (*decrypt_fn)(unsigned char *m, ull *mlen, unsigned char *nsec, const unsigned char *c, ull clen,
                          const unsigned char *ad, ull adlen, const unsigned char *npub, const unsigned char *k);

/* One suite under one key: see aead.py. */
typedef struct {
    uintptr_t function;
    Py_ssize_t nonce, counter_at, tag, key_size;
    const char *key; /* of the size that Aead has checked */
} cipher;

static int bad_cipher(const cipher *suite)
{
    if (suite->function && suite->nonce <= MOST_NONCE && suite->counter_at >= 0 &&
        suite->counter_at + 8 <= suite->nonce && suite->tag > 0 && suite->tag <= MOST_TAG && suite->key_size >= 16)
        return 0;
    PyErr_SetString(PyExc_ValueError, "not the sizes of a cipher");
    return 1;
}

static void set_nonce(unsigned char *nonce, const cipher *suite, uint64_t counter)
{
    memset(nonce, 0, MOST_NONCE);
    for (int i = 0; i < 8; i++)
        nonce[suite->counter_at + i] = (unsigned char)(counter >> 8 * i);
}

static uint32_t big(const unsigned char *at)
{
    return (uint32_t)at[0] << 24 | (uint32_t)at[1] << 16 | (uint32_t)at[2] << 8 | at[3];
}

static PyObject *py_seal(PyObject *self, PyObject *args)
{
    cipher suite;
    ull function, counter;
    PyObject *jobs;
    if (!PyArg_ParseTuple(args, "Knnny#KO!", &function, &suite.nonce, &suite.counter_at, &suite.tag, &suite.key,
                          &suite.key_size, &counter, &PyList_Type, &jobs))
        return NULL;
    suite.function = (uintptr_t)function;
    if (bad_cipher(&suite))
        return NULL;
    Py_ssize_t count = PyList_Size(jobs), held = 0;
    Py_buffer wires[MOST_JOBS], bodies[MOST_JOBS];
    Py_ssize_t heads[MOST_JOBS];
    int wrong = count > MOST_JOBS;
    for (; held < count && !wrong; held++) {
        PyObject *job = PyList_GetItem(jobs, held), *wire, *body;
        if (!PyTuple_Check(job) || !PyArg_ParseTuple(job, "OnO", &wire, &heads[held], &body))
            break;
        if (PyObject_GetBuffer(wire, &wires[held], PyBUF_WRITABLE) < 0)
            break;
        if (PyObject_GetBuffer(body, &bodies[held], PyBUF_SIMPLE) < 0) {
            PyBuffer_Release(&wires[held]);
            break;
        }
        wrong = heads[held] < 0 || heads[held] > wires[held].len ||
                wires[held].len != HEADER + heads[held] + bodies[held].len + 2 * suite.tag;
    }
    int done = held == count && !wrong;
    if (done) {
        Py_BEGIN_ALLOW_THREADS
        unsigned char nonce[MOST_NONCE];
        encrypt_fn encrypt = (encrypt_fn)suite.function;
        const unsigned char *key = (const unsigned char *)suite.key;
        for (Py_ssize_t i = 0; i < count; i++) {
            unsigned char *wire = wires[i].buf, *head = wire + HEADER, *body = head + heads[i] + suite.tag;
            set_nonce(nonce, &suite, counter++);
            encrypt(head, NULL, head, (ull)heads[i], wire, HEADER, NULL, nonce, key);
            set_nonce(nonce, &suite, counter++);
            encrypt(body, NULL, bodies[i].buf, (ull)bodies[i].len, wire, HEADER, NULL, nonce, key);
        }
        Py_END_ALLOW_THREADS
    } else if (!PyErr_Occurred()) {
        PyErr_SetString(PyExc_ValueError, "a record of another size than its parts, or too many of them");
    }
    for (Py_ssize_t i = 0; i < held; i++) {
        PyBuffer_Release(&wires[i]);
        PyBuffer_Release(&bodies[i]);
    }
    return done ? Py_NewRef(Py_None) : NULL;
}

/* --- jobs of the thread ------------------------------------------------------------------------------------------ */

/* Why a job of `receive` ended; pump.py has the same names. */
enum { WAIT, ENDED, FAILED, FORGED, HEADED };
enum { PARKED, MORE, OVER }; /* what a step says: wait for the socket, go on when others had their turn, no more */
enum { MOST_KEY = 64 };

/* A record to send: `prefix` (the length before it and its head, in clear) and `body` are sealed into `wire` when its
 * turn comes; without a wire `body` is the record as it goes out. */
typedef struct {
    unsigned char *wire;
    const unsigned char *prefix, *body;
    Py_ssize_t prefix_size, body_size, size;
    uint64_t counter;
} item;

typedef struct pump pump;

typedef struct job {
    PyObject_HEAD
    pump *of;        /* whose list it is in, or None's place: NULL once it was taken back */
    PyObject *token; /* what Python knows it by */
    struct job *next;
    int sends, fd, listed, ready, active, over;
    nfds_t slot;
    double due; /* when what came is told */
    Py_buffer *views;
    Py_ssize_t view_count;
    cipher suite;
    char key[MOST_KEY];
    int status, error;
    /* sending */
    item *items;
    Py_ssize_t count, at, sealed, offset;
    /* receiving */
    unsigned char *whole, *sink;
    Py_ssize_t room, filled, length, sink_size, largest, least, records, landed, came, most, enough;
    uint32_t word, number, stream, control, bulk;
    uint64_t counter;
    int drained, between; /* between: no record is under way, and of the next one's length `have` bytes are here */
    Py_ssize_t have;
    unsigned char next_word[HEADER];
    double linger;
} job;

struct pump {
    PyObject_HEAD
    pthread_mutex_t lock;
    pthread_cond_t free; /* some job is not active any more */
    pthread_t thread;
    pid_t owner;
    job *jobs;          /* in work, the newest first */
    job *done, **last;  /* over, in order, until `finished` */
    int running, quit, sleeping, waiting, rung;
    int wake[2], bell[2]; /* pipes: for the thread, for Python */
};

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void ring(int fd)
{
    while (write(fd, "", 1) < 0 && errno == EINTR)
        ; /* full: then it is heard anyway */
}

static void hush(int fd)
{
    char heard[64];
    ssize_t size;
    do
        size = read(fd, heard, sizeof heard);
    while (size == sizeof heard || (size < 0 && errno == EINTR));
}

static int would_block(void)
{
    return errno == EAGAIN || errno == EWOULDBLOCK;
}

static int send_step(job *j)
{
    unsigned char nonce[MOST_NONCE];
    encrypt_fn encrypt = (encrypt_fn)j->suite.function;
    const unsigned char *key = (const unsigned char *)j->key;
    Py_ssize_t left = STEP;
    while (j->at < j->count) {
        item *each = &j->items[j->at];
        if (each->wire && j->sealed <= j->at) {
            unsigned char *head = each->wire + HEADER;
            Py_ssize_t size = each->prefix_size - HEADER;
            memcpy(each->wire, each->prefix, (size_t)each->prefix_size);
            set_nonce(nonce, &j->suite, each->counter);
            encrypt(head, NULL, head, (ull)size, each->wire, HEADER, NULL, nonce, key);
            set_nonce(nonce, &j->suite, each->counter + 1);
            encrypt(head + size + j->suite.tag, NULL, each->body, (ull)each->body_size, each->wire, HEADER, NULL, nonce,
                    key);
            j->sealed = j->at + 1;
        }
        const unsigned char *wire = each->wire ? each->wire : each->body;
        ssize_t sent = send(j->fd, wire + j->offset, (size_t)(each->size - j->offset), MSG_DONTWAIT | MSG_NOSIGNAL);
        if (sent < 0) {
            if (errno == EINTR)
                continue;
            if (would_block())
                return PARKED;
            j->error = errno;
            return OVER;
        }
        j->offset += sent;
        if (j->offset == each->size) {
            j->offset = 0;
            j->at++;
        }
        left -= sent;
        if (left <= 0 && j->at < j->count)
            return MORE;
    }
    return OVER;
}

static const uint32_t shape = 1u << 31 | (uint32_t)SPLIT_HEAD << 22, length_mask = (1u << 22) - 1;

/* The length of the next record is here: whether it is one for us. Otherwise Python takes it, and what follows it. */
static int begins(job *j)
{
    uint32_t word = big(j->next_word);
    Py_ssize_t length = word & length_mask;
    if ((word & ~length_mask) != shape || length < j->least || length > j->largest ||
        length < SPLIT_HEAD + 2 * j->suite.tag + 1 || length + HEADER > j->room)
        return 0;
    j->word = word;
    j->length = length;
    j->between = 0;
    j->have = 0;
    return 1;
}

static int receive_step(job *j)
{
    unsigned char nonce[MOST_NONCE], header[HEADER], *whole = j->whole;
    decrypt_fn decrypt = (decrypt_fn)j->suite.function;
    const unsigned char *key = (const unsigned char *)j->key;
    const Py_ssize_t tag = j->suite.tag, stop = SPLIT_HEAD + tag;
    Py_ssize_t left = STEP;
    for (;;) {
        if (j->between || j->filled < j->length) {
            size_t asked;
            ssize_t size;
            if (left <= 0)
                return MORE;
            if (j->between) {
                /* Most records are as long as the one before: then it and the length of the one after it are read. */
                struct iovec parts[2] = {{j->next_word + j->have, (size_t)(HEADER - j->have)},
                                         {whole, (size_t)(j->length + HEADER)}};
                struct msghdr message = {.msg_iov = parts, .msg_iovlen = 2};
                asked = parts[0].iov_len + parts[1].iov_len;
                size = recvmsg(j->fd, &message, MSG_DONTWAIT);
            } else {
                asked = (size_t)(j->length + HEADER - j->filled);
                size = recv(j->fd, whole + j->filled, asked, MSG_DONTWAIT);
            }
            if (size < 0 && errno == EINTR)
                continue;
            if (size <= 0) {
                j->drained = size < 0 && would_block();
                j->error = size < 0 && !j->drained ? errno : 0;
                j->status = size == 0 ? ENDED : j->drained ? WAIT : FAILED;
                return j->drained ? PARKED : OVER;
            }
            if (!j->came)
                j->due = now() + j->linger;
            j->came += size;
            left -= size;
            j->drained = (size_t)size < asked;
            if (j->between) {
                Py_ssize_t word = size < HEADER - j->have ? size : HEADER - j->have;
                j->have += word;
                j->filled = size - word;
                if (j->have < HEADER)
                    return PARKED;
                if (!begins(j))
                    return OVER;
            } else {
                j->filled += size;
            }
            if (j->filled < j->length) {
                if (j->drained)
                    return PARKED;
                continue;
            }
        }
        for (int i = 0; i < HEADER; i++)
            header[i] = (unsigned char)(j->word >> (24 - 8 * i));
        set_nonce(nonce, &j->suite, j->counter);
        if (decrypt(whole, NULL, NULL, whole, (ull)stop, header, HEADER, nonce, key) != 0) {
            j->status = FORGED;
            return OVER;
        }
        Py_ssize_t body = j->length - stop - tag;
        if (whole[0] != BULK || big(whole + 1) != j->number || whole[13] != DATA || big(whole + 14) != j->stream ||
            big(whole + 18) != (uint32_t)body || body > j->sink_size - j->landed) {
            j->status = HEADED;
            return OVER;
        }
        set_nonce(nonce, &j->suite, j->counter + 1);
        if (decrypt(j->sink + j->landed, NULL, NULL, whole + stop, (ull)(j->length - stop), header, HEADER, nonce,
                    key) != 0) {
            j->counter++;
            j->status = FORGED;
            return OVER;
        }
        j->control = big(whole + 5);
        j->bulk = big(whole + 9);
        j->counter += 2;
        j->number++;
        j->records++;
        j->landed += body;
        j->between = 1;
        Py_ssize_t beyond = j->filled - j->length; /* more than its length only where the one before was longer */
        j->have = beyond < HEADER ? beyond : HEADER;
        memcpy(j->next_word, whole + j->length, (size_t)j->have);
        j->filled = beyond - j->have;
        memmove(whole, whole + j->length + j->have, (size_t)j->filled);
        if (j->records == j->most || j->landed == j->sink_size || j->landed >= j->enough)
            return OVER;
        if (j->have == HEADER && !begins(j))
            return OVER;
    }
}

/* With `lock` held: `j` leaves the list of jobs in work. */
static void unlist(pump *p, job *j)
{
    for (job **at = &p->jobs; *at; at = &(*at)->next)
        if (*at == j) {
            *at = j->next;
            break;
        }
    j->next = NULL;
    j->listed = 0;
    j->over = 1;
}

/* With `lock` held: `j` is over, and Python is told. */
static void finish(pump *p, job *j)
{
    unlist(p, j);
    *p->last = j;
    p->last = &j->next;
    if (!p->rung) {
        p->rung = 1;
        ring(p->bell[1]);
    }
}

static int late(const job *j, double time)
{
    return !j->sends && j->came && time >= j->due;
}

static void *work(void *of)
{
    pump *p = of;
    struct pollfd *fds = NULL;
    size_t room = 0;
    pthread_mutex_lock(&p->lock);
    while (!p->quit) {
        int ready = 0;
        nfds_t count = 1;
        for (job *j = p->jobs, *next; j && !p->quit; j = next) {
            if (j->ready) {
                j->active = 1;
                pthread_mutex_unlock(&p->lock);
                int state = j->sends ? send_step(j) : receive_step(j);
                if (state == PARKED && late(j, now()))
                    state = OVER;
                pthread_mutex_lock(&p->lock);
                j->active = 0;
                j->ready = state == MORE;
                if (p->waiting)
                    pthread_cond_broadcast(&p->free);
                next = j->next; /* it stayed in the list: nobody takes an active one out */
                if (state == OVER)
                    finish(p, j);
            } else {
                next = j->next;
            }
        }
        if (p->quit)
            break;
        double due = 0;
        for (job *j = p->jobs; j; j = j->next) {
            ready |= j->ready;
            count++;
            if (!j->sends && j->came && (!due || j->due < due))
                due = j->due;
        }
        if (count > room) {
            size_t wanted = count + 16;
            struct pollfd *larger = realloc(fds, wanted * sizeof *fds);
            if (!larger && !fds) { /* not even a few bytes are to be had */
                while (p->jobs) {
                    p->jobs->status = FAILED;
                    p->jobs->error = ENOMEM;
                    finish(p, p->jobs);
                }
                break;
            }
            if (larger) {
                fds = larger;
                room = wanted;
            }
        }
        fds[0] = (struct pollfd){.fd = p->wake[0], .events = POLLIN};
        count = 1;
        for (job *j = p->jobs; j; j = j->next) {
            j->slot = 0;
            if (!j->ready && count < room) {
                j->slot = count;
                fds[count++] = (struct pollfd){.fd = j->fd, .events = j->sends ? POLLOUT : POLLIN};
            }
        }
        int timeout = ready ? 0 : -1;
        if (!ready && due) {
            double left = due - now();
            timeout = left > 0 ? (int)(left * 1e3) + 1 : 0;
        }
        p->sleeping = 1;
        pthread_mutex_unlock(&p->lock);
        int polled = poll(fds, count, timeout);
        if (polled < 0 && errno != EINTR)
            poll(NULL, 0, 1); /* more descriptors than this process may have: then each is tried */
        pthread_mutex_lock(&p->lock);
        p->sleeping = 0;
        if (polled < 0) {
            fds[0].revents = POLLIN;
            for (nfds_t i = 1; i < count; i++)
                fds[i].revents = fds[i].events;
        }
        if (fds[0].revents)
            hush(p->wake[0]);
        double time = now();
        for (job *j = p->jobs, *next; j; j = next) {
            next = j->next;
            if (j->slot && fds[j->slot].revents)
                j->ready = 1;
            else if (j->slot && late(j, time))
                finish(p, j);
        }
    }
    p->quit = 1;
    pthread_mutex_unlock(&p->lock);
    free(fds);
    return NULL;
}

/* --- objects ----------------------------------------------------------------------------------------------------- */

static PyTypeObject *job_type, *pump_type;

static void release(job *j)
{
    for (Py_ssize_t i = 0; i < j->view_count; i++)
        PyBuffer_Release(&j->views[i]);
    PyMem_Free(j->views);
    PyMem_Free(j->items);
    j->views = NULL;
    j->items = NULL;
    j->view_count = 0;
}

static void job_dealloc(job *j)
{
    PyTypeObject *type = Py_TYPE((PyObject *)j);
    release(j);
    Py_XDECREF(j->token);
    Py_XDECREF((PyObject *)j->of);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(j);
    Py_DECREF(type);
}

static job *new_job(pump *p, PyObject *token, int fd, const cipher *suite)
{
    if (bad_cipher(suite))
        return NULL;
    if (suite->key_size > MOST_KEY) {
        PyErr_SetString(PyExc_ValueError, "not the sizes of a cipher");
        return NULL;
    }
    job *j = (job *)((allocfunc)PyType_GetSlot(job_type, Py_tp_alloc))(job_type, 0);
    if (!j)
        return NULL;
    j->of = (pump *)Py_NewRef((PyObject *)p);
    j->token = Py_NewRef(token);
    j->fd = fd;
    j->suite = *suite;
    memcpy(j->key, suite->key, (size_t)suite->key_size);
    j->suite.key = NULL; /* `key` has it */
    return j;
}

static Py_buffer *view(job *j, PyObject *of, int flags)
{
    Py_buffer *at = &j->views[j->view_count];
    if (PyObject_GetBuffer(of, at, flags) < 0)
        return NULL;
    j->view_count++;
    return at;
}

/* Give it to the thread, unless it is over with a first step, here, where that is asked for. Takes the reference over,
 * and gives Python one. */
static PyObject *submit(pump *p, job *j, int first)
{
    if (first) {
        int state;
        Py_BEGIN_ALLOW_THREADS
        state = j->sends ? send_step(j) : receive_step(j);
        Py_END_ALLOW_THREADS
        if (state == OVER) {
            j->over = 1;
            return (PyObject *)j;
        }
    }
    pthread_mutex_lock(&p->lock);
    int quit = p->quit;
    if (!quit) {
        j->listed = 1;
        j->ready = 1; /* or it came while we looked */
        j->next = p->jobs;
        p->jobs = j;
        if (p->sleeping)
            ring(p->wake[1]);
    }
    pthread_mutex_unlock(&p->lock);
    if (quit) {
        Py_DECREF((PyObject *)j);
        PyErr_SetString(PyExc_RuntimeError, "the pump is closed");
        return NULL;
    }
    return Py_NewRef((PyObject *)j);
}

static PyObject *pump_send(pump *p, PyObject *args)
{
    cipher suite;
    ull function;
    int fd;
    int first;
    PyObject *token, *list;
    if (!PyArg_ParseTuple(args, "OpiKnnny#O!", &token, &first, &fd, &function, &suite.nonce, &suite.counter_at,
                          &suite.tag, &suite.key, &suite.key_size, &PyList_Type, &list))
        return NULL;
    suite.function = (uintptr_t)function;
    job *j = new_job(p, token, fd, &suite);
    if (!j)
        return NULL;
    j->sends = 1;
    Py_ssize_t count = PyList_Size(list);
    j->items = PyMem_Calloc((size_t)count + 1, sizeof *j->items);
    j->views = PyMem_Calloc(3 * (size_t)count + 1, sizeof *j->views);
    if (!j->items || !j->views) {
        PyErr_NoMemory();
        goto failed;
    }
    for (; j->count < count; j->count++) {
        item *each = &j->items[j->count];
        PyObject *of = PyList_GetItem(list, j->count), *wire, *prefix, *body;
        ull counter;
        Py_buffer *at;
        if (!PyTuple_Check(of)) {
            PyErr_SetString(PyExc_TypeError, "a record to send is a tuple");
            goto failed;
        }
        if (!PyArg_ParseTuple(of, "OOOK", &wire, &prefix, &body, &counter) || !(at = view(j, body, PyBUF_SIMPLE)))
            goto failed;
        each->counter = counter;
        each->body = at->buf;
        each->body_size = each->size = at->len;
        if (wire == Py_None)
            continue;
        if (!(at = view(j, prefix, PyBUF_SIMPLE)))
            goto failed;
        each->prefix = at->buf;
        each->prefix_size = at->len;
        if (!(at = view(j, wire, PyBUF_WRITABLE)))
            goto failed;
        each->wire = at->buf;
        each->size = each->prefix_size + each->body_size + 2 * suite.tag;
        if (each->prefix_size < HEADER || each->size > at->len) {
            PyErr_SetString(PyExc_ValueError, "a wire that is not as long as its record");
            goto failed;
        }
    }
    return submit(p, j, first);
failed:
    Py_DECREF((PyObject *)j);
    return NULL;
}

static PyObject *pump_receive(pump *p, PyObject *args)
{
    cipher suite;
    ull function, counter;
    int fd;
    unsigned int word, number, stream;
    Py_ssize_t filled, largest, least, most, enough;
    double linger;
    int first;
    PyObject *token, *buffer, *sink;
    if (!PyArg_ParseTuple(args, "OpiKnnny#KOInnnIIOnnd", &token, &first, &fd, &function, &suite.nonce,
                          &suite.counter_at, &suite.tag, &suite.key, &suite.key_size, &counter, &buffer, &word,
                          &filled, &least, &largest, &number, &stream, &sink, &most, &enough, &linger))
        return NULL;
    suite.function = (uintptr_t)function;
    job *j = new_job(p, token, fd, &suite);
    if (!j)
        return NULL;
    Py_buffer *at;
    if (!(j->views = PyMem_Calloc(2, sizeof *j->views))) {
        PyErr_NoMemory();
        goto failed;
    }
    if (!(at = view(j, buffer, PyBUF_WRITABLE)))
        goto failed;
    j->whole = at->buf;
    j->room = at->len;
    if (!(at = view(j, sink, PyBUF_WRITABLE)))
        goto failed;
    j->sink = at->buf;
    j->sink_size = at->len;
    j->between = filled < 0;
    j->word = word;
    j->length = j->between ? largest : word & length_mask;
    if (j->length < SPLIT_HEAD + 2 * suite.tag + 1 || j->length + HEADER > j->room || filled >= j->length || most < 1 ||
        (!j->between && (word & ~length_mask) != shape)) {
        PyErr_SetString(PyExc_ValueError, "not what a run of records begins with");
        goto failed;
    }
    j->filled = j->between ? 0 : filled;
    j->least = least;
    j->largest = largest;
    j->number = number;
    j->stream = stream;
    j->counter = counter;
    j->most = most;
    j->enough = enough;
    j->linger = linger;
    return submit(p, j, first);
failed:
    Py_DECREF((PyObject *)j);
    return NULL;
}

/* Take a job back, wherever the thread is with it. */
static PyObject *job_stop(job *j, PyObject *unused)
{
    pump *p = j->of;
    int held = 0;
    Py_BEGIN_ALLOW_THREADS
    pthread_mutex_lock(&p->lock);
    p->waiting++;
    while (j->active)
        pthread_cond_wait(&p->free, &p->lock);
    p->waiting--;
    if (j->listed) {
        unlist(p, j);
        held = 1;
    }
    pthread_mutex_unlock(&p->lock);
    Py_END_ALLOW_THREADS
    if (held)
        Py_DECREF((PyObject *)j); /* the list's */
    Py_RETURN_NONE;
}

static PyObject *job_result(job *j, PyObject *unused)
{
    pthread_mutex_lock(&j->of->lock);
    int over = j->over;
    pthread_mutex_unlock(&j->of->lock);
    if (!over) {
        PyErr_SetString(PyExc_RuntimeError, "that job is not over");
        return NULL;
    }
    release(j);
    if (j->sends)
        return Py_BuildValue("nni", j->at, j->offset, j->error);
    return Py_BuildValue("innnInOIIKiOy#", j->status, j->records, j->landed, j->came, j->word, j->filled,
                         j->drained ? Py_True : Py_False, j->control, j->bulk, j->counter, j->error,
                         j->between ? Py_True : Py_False, (const char *)j->next_word, j->have);
}

static PyObject *pump_finished(pump *p, PyObject *unused)
{
    PyObject *tokens = PyList_New(0);
    if (!tokens)
        return NULL;
    pthread_mutex_lock(&p->lock);
    job *done = p->done;
    p->done = NULL;
    p->last = &p->done;
    p->rung = 0;
    hush(p->bell[0]);
    pthread_mutex_unlock(&p->lock);
    while (done) {
        job *next = done->next;
        done->next = NULL;
        if (tokens && PyList_Append(tokens, done->token) < 0)
            Py_CLEAR(tokens);
        Py_DECREF((PyObject *)done);
        done = next;
    }
    return tokens;
}

static PyObject *pump_close(pump *p, PyObject *unused)
{
    if (!p->running)
        Py_RETURN_NONE;
    p->running = 0;
    Py_BEGIN_ALLOW_THREADS
    if (p->owner == getpid()) { /* a child after a fork has no such thread */
        pthread_mutex_lock(&p->lock);
        p->quit = 1;
        ring(p->wake[1]);
        pthread_mutex_unlock(&p->lock);
        pthread_join(p->thread, NULL);
    }
    Py_END_ALLOW_THREADS
    p->quit = 1;
    for (job *list = p->jobs, *next; list; list = next) {
        next = list->next;
        list->next = NULL;
        list->listed = 0;
        list->over = 1;
        Py_DECREF((PyObject *)list);
    }
    p->jobs = NULL;
    Py_XDECREF(pump_finished(p, NULL));
    for (int i = 0; i < 2; i++) {
        close(p->wake[i]);
        close(p->bell[i]);
        p->wake[i] = p->bell[i] = -1;
    }
    Py_RETURN_NONE;
}

static void pump_dealloc(pump *p)
{
    PyTypeObject *type = Py_TYPE((PyObject *)p);
    if (p->running)
        Py_XDECREF(pump_close(p, NULL)); /* without jobs: each of them keeps us */
    if (p->last) {
        pthread_cond_destroy(&p->free);
        pthread_mutex_destroy(&p->lock);
    }
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(p);
    Py_DECREF(type);
}

static int quiet_pipe(int ends[2])
{
    if (pipe(ends) < 0)
        return -1;
    for (int i = 0; i < 2; i++)
        if (fcntl(ends[i], F_SETFL, O_NONBLOCK) < 0 || fcntl(ends[i], F_SETFD, FD_CLOEXEC) < 0) {
            int error = errno;
            close(ends[0]);
            close(ends[1]);
            errno = error;
            return -1;
        }
    return 0;
}

static PyObject *pump_new(PyTypeObject *type, PyObject *args, PyObject *named)
{
    if (!PyArg_ParseTuple(args, "") || (named && PyDict_Size(named)))
        return PyErr_Occurred() ? NULL : PyErr_Format(PyExc_TypeError, "a pump takes no arguments");
    pump *p = (pump *)((allocfunc)PyType_GetSlot(type, Py_tp_alloc))(type, 0);
    if (!p)
        return NULL;
    if (quiet_pipe(p->wake) < 0)
        goto failed;
    if (quiet_pipe(p->bell) < 0) {
        int error = errno;
        close(p->wake[0]);
        close(p->wake[1]);
        errno = error;
        goto failed;
    }
    pthread_mutex_init(&p->lock, NULL);
    pthread_cond_init(&p->free, NULL);
    p->last = &p->done;
    p->owner = getpid();
    sigset_t all, before;
    sigfillset(&all); /* signals are for Python's threads */
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int error = pthread_create(&p->thread, NULL, work, p);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (error) {
        for (int i = 0; i < 2; i++) {
            close(p->wake[i]);
            close(p->bell[i]);
        }
        errno = error;
        goto failed;
    }
    p->running = 1;
    return (PyObject *)p;
failed:
    PyErr_SetFromErrno(PyExc_OSError);
    Py_DECREF((PyObject *)p);
    return NULL;
}

static PyObject *pump_bell(pump *p, void *unused)
{
    return PyLong_FromLong(p->bell[0]);
}

static PyMethodDef job_methods[] = {
    {"stop", (PyCFunction)job_stop, METH_NOARGS, "stop()"},
    {"result", (PyCFunction)job_result, METH_NOARGS, "result()"},
    {NULL, NULL, 0, NULL},
};

static PyObject *job_over(job *j, void *unused)
{
    pthread_mutex_lock(&j->of->lock);
    int over = j->over;
    pthread_mutex_unlock(&j->of->lock);
    return PyBool_FromLong(over);
}

static PyGetSetDef job_getters[] = {
    {"over", (getter)job_over, NULL, "the thread has nothing to do with it any more", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot job_slots[] = {
    {Py_tp_getset, job_getters},
    {Py_tp_dealloc, job_dealloc},
    {Py_tp_methods, job_methods},
    {0, NULL},
};

static PyType_Spec job_spec = {"shoal.transport._pump.Job", sizeof(job), 0,
                               Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, job_slots};

static PyMethodDef pump_methods[] = {
    {"send", (PyCFunction)pump_send, METH_VARARGS, "send(token, first, fd, encrypt, nonce, counter_at, tag, key, records)"},
    {"receive", (PyCFunction)pump_receive, METH_VARARGS,
     "receive(token, first, fd, decrypt, nonce, counter_at, tag, key, counter, buffer, word, filled, least, largest, number, "
     "stream, sink, most, enough, linger)"},
    {"finished", (PyCFunction)pump_finished, METH_NOARGS, "finished()"},
    {"close", (PyCFunction)pump_close, METH_NOARGS, "close()"},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef pump_getters[] = {
    {"bell", (getter)pump_bell, NULL, "a descriptor that is readable when jobs are finished", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot pump_slots[] = {
    {Py_tp_new, pump_new},
    {Py_tp_dealloc, pump_dealloc},
    {Py_tp_methods, pump_methods},
    {Py_tp_getset, pump_getters},
    {0, NULL},
};

static PyType_Spec pump_spec = {"shoal.transport._pump.Pump", sizeof(pump), 0, Py_TPFLAGS_DEFAULT, pump_slots};

static PyMethodDef methods[] = {
    {"seal", py_seal, METH_VARARGS, "seal(encrypt, nonce, counter_at, tag, key, counter, jobs)"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_pump", "Runs of large records in C; see pump.py.", -1, methods, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__pump(void)
{
    PyObject *made = PyModule_Create(&module);
    job_type = (PyTypeObject *)PyType_FromSpec(&job_spec);
    pump_type = (PyTypeObject *)PyType_FromSpec(&pump_spec);
    if (made && job_type && pump_type && PyModule_AddIntConstant(made, "REVISION", REVISION) == 0 &&
        PyModule_AddObjectRef(made, "Pump", (PyObject *)pump_type) == 0)
        return made;
    Py_XDECREF(made);
    return NULL;
}
