/* An S3 server that costs as little as one can: it keeps what is written in memory, answers after a delay, and sends no
 * faster than a rate for each connection. PUT creates only; GET knows ranges; LIST (version 2) has one page; what is
 * deleted is forgotten. Paths have the bucket in them. No signatures are looked at. For benchmarks of clients only.
 *
 *     nulls3 PORT DELAY_MS MB_PER_S     (0: no delay, no limit)
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <time.h>
#include <unistd.h>

enum { HEAD = 16 << 10, SHELVES = 1 << 16, PIECE = 256 << 10 };

struct object {
    struct object *next;
    char *name, *data;
    size_t size;
    time_t written;
};

static struct object *shelves[SHELVES];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static long delay_ms;
static double rate;

static unsigned shelf(const char *name)
{
    unsigned hash = 5381;
    while (*name)
        hash = hash * 33 + (unsigned char)*name++;
    return hash % SHELVES;
}

static struct object *find(const char *name)
{
    struct object *each = shelves[shelf(name)];
    while (each && strcmp(each->name, name))
        each = each->next;
    return each;
}

static void pause_s(double seconds)
{
    struct timespec left = {(time_t)seconds, (long)((seconds - (time_t)seconds) * 1e9)};
    nanosleep(&left, NULL);
}

static double now(void)
{
    struct timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    return at.tv_sec + at.tv_nsec / 1e9;
}

static int put_all(int fd, const char *data, size_t size)
{
    double begun = now();
    size_t done = 0;
    while (done < size) {
        size_t piece = size - done < PIECE ? size - done : PIECE;
        ssize_t sent = send(fd, data + done, piece, MSG_NOSIGNAL);
        if (sent <= 0)
            return -1;
        done += (size_t)sent;
        if (rate > 0) {
            double early = done / rate - (now() - begun);
            if (early > 0.001)
                pause_s(early);
        }
    }
    return 0;
}

static int answer(int fd, const char *status, const char *more, const char *data, size_t size)
{
    char head[512];
    int length = snprintf(head, sizeof head,
                          "HTTP/1.1 %s\r\nETag: \"e\"\r\nLast-Modified: Mon, 02 Nov 2026 00:00:00 GMT\r\n%s"
                          "Content-Length: %zu\r\n\r\n",
                          status, more, size);
    if (send(fd, head, (size_t)length, MSG_NOSIGNAL) != length)
        return -1;
    return size && data ? put_all(fd, data, size) : 0;
}

static int take_all(int fd, char *into, size_t size)
{
    size_t done = 0;
    while (done < size) {
        ssize_t got = recv(fd, into + done, size - done, 0);
        if (got <= 0)
            return -1;
        done += (size_t)got;
    }
    return 0;
}

/* The whole object, or the range that was asked for. */
static int send_object(int fd, const struct object *found, const char *range)
{
    size_t first, last;
    char more[128];
    if (!range || sscanf(range, "%zu-%zu", &first, &last) != 2 || first >= found->size)
        return answer(fd, "200 OK", "", found->data, found->size);
    last = last < found->size ? last : found->size - 1;
    snprintf(more, sizeof more, "Content-Range: bytes %zu-%zu/%zu\r\n", first, last, found->size);
    return answer(fd, "206 Partial Content", more, found->data + first, last - first + 1);
}

/* All objects whose name begins so: path is /BUCKET?...&prefix=PREFIX, with / as %2F. */
static int list(int fd, char *path)
{
    char prefix[1024], *query = strchr(path, '?'), *given = strstr(query, "prefix="), *text = NULL;
    size_t size = 0, bucket = (size_t)(query - path);
    int length = snprintf(prefix, sizeof prefix, "%.*s/", (int)bucket, path);
    for (char *at = given ? given + 7 : ""; *at && *at != '&' && length < 1000; at++)
        if (!strncasecmp(at, "%2f", 3))
            prefix[length++] = '/', at += 2;
        else
            prefix[length++] = *at;
    FILE *into = open_memstream(&text, &size);
    fprintf(into, "<?xml version=\"1.0\"?><ListBucketResult><IsTruncated>false</IsTruncated>");
    pthread_mutex_lock(&lock);
    for (int at = 0; at < SHELVES; at++)
        for (struct object *each = shelves[at]; each; each = each->next)
            if (!strncmp(each->name, prefix, (size_t)length)) {
                char when[32];
                strftime(when, sizeof when, "%Y-%m-%dT%H:%M:%S.000Z", gmtime(&each->written));
                fprintf(into,
                        "<Contents><Key>%s</Key><LastModified>%s</LastModified><ETag>&quot;e&quot;</ETag>"
                        "<Size>%zu</Size></Contents>",
                        each->name + bucket + 1, when, each->size);
            }
    pthread_mutex_unlock(&lock);
    fprintf(into, "</ListBucketResult>");
    fclose(into);
    int status = answer(fd, "200 OK", "", text, size);
    free(text);
    return status;
}

static void forget(const char *name)
{
    pthread_mutex_lock(&lock);
    for (struct object **each = &shelves[shelf(name)]; *each; each = &(*each)->next)
        if (!strcmp((*each)->name, name)) {
            *each = (*each)->next; /* its bytes stay: another connection may be sending them */
            break;
        }
    pthread_mutex_unlock(&lock);
}

/* What the body of a bulk delete names. */
static int forget_all(int fd, const char *path, char *body)
{
    char *text = NULL;
    size_t size = 0;
    FILE *into = open_memstream(&text, &size);
    fprintf(into, "<?xml version=\"1.0\"?><DeleteResult>");
    for (char *key = body; (key = strstr(key, "<Key>"));) {
        char name[1024], *end = strstr(key += 5, "</Key>");
        if (!end)
            break;
        snprintf(name, sizeof name, "%.*s/%.*s", (int)strcspn(path, "?"), path, (int)(end - key), key);
        forget(name);
        fprintf(into, "<Deleted><Key>%.*s</Key></Deleted>", (int)(end - key), key);
    }
    fprintf(into, "</DeleteResult>");
    fclose(into);
    int status = answer(fd, "200 OK", "", text, size);
    free(text);
    return status;
}

static int serve_one(int fd, char *head, size_t *have)
{
    char *end;
    while (!(end = memmem(head, *have, "\r\n\r\n", 4))) {
        ssize_t got = *have < HEAD ? recv(fd, head + *have, HEAD - *have, 0) : 0;
        if (got <= 0)
            return -1;
        *have += (size_t)got;
    }
    size_t head_bytes = (size_t)(end - head) + 4, length = 0;
    *end = 0;
    char *line = strcasestr(head, "\r\ncontent-length:");
    if (line)
        length = strtoul(line + 17, NULL, 10);
    char method[8] = "", path[1024] = "";
    if (sscanf(head, "%7s %1023s", method, path) != 2)
        return -1;
    char *range = strcasestr(head, "\r\nrange: bytes=");
    range = range ? range + 15 : NULL;
    char *data = malloc(length + 1);
    data[length] = 0;
    size_t early = *have - head_bytes < length ? *have - head_bytes : length;
    if (length) {
        memcpy(data, head + head_bytes, early);
        if (take_all(fd, data + early, length - early))
            return -1;
    }
    char wanted[64] = "";
    if (range)
        snprintf(wanted, sizeof wanted, "%.60s", range);
    memmove(head, head + head_bytes + early, *have - head_bytes - early);
    *have -= head_bytes + early;
    if (delay_ms)
        pause_s(delay_ms / 1e3);
    if (!strcmp(method, "POST")) {
        int status = forget_all(fd, path, data);
        free(data);
        return status;
    }
    if (!strcmp(method, "PUT")) {
        pthread_mutex_lock(&lock);
        struct object *old = find(path);
        if (!old) {
            struct object *new = calloc(1, sizeof *new);
            new->name = strdup(path);
            new->data = data;
            new->size = length;
            new->written = time(NULL);
            new->next = shelves[shelf(path)];
            shelves[shelf(path)] = new;
        } else {
            free(data);
        }
        pthread_mutex_unlock(&lock);
        return answer(fd, old ? "412 Precondition Failed" : "200 OK", "", NULL, 0);
    }
    free(data);
    if (!strcmp(method, "DELETE")) {
        forget(path);
        return answer(fd, "204 No Content", "", NULL, 0);
    }
    if (strcmp(method, "GET"))
        return answer(fd, "200 OK", "", NULL, 0);
    if (strchr(path, '?'))
        return list(fd, path);
    pthread_mutex_lock(&lock);
    struct object *found = find(path); /* what is deleted stays in memory */
    pthread_mutex_unlock(&lock);
    return found ? send_object(fd, found, *wanted ? wanted : NULL) : answer(fd, "404 Not Found", "", NULL, 0);
}

static void *serve(void *given)
{
    int fd = (int)(long)given, one = 1;
    size_t have = 0;
    char *head = malloc(HEAD);
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    while (!serve_one(fd, head, &have))
        ;
    close(fd);
    free(head);
    return NULL;
}

int main(int count, char **words)
{
    if (count != 4)
        return 2;
    signal(SIGPIPE, SIG_IGN);
    delay_ms = atol(words[2]);
    rate = atof(words[3]) * 1e6;
    int listener = socket(AF_INET, SOCK_STREAM, 0), one = 1;
    struct sockaddr_in where = {.sin_family = AF_INET, .sin_port = htons((unsigned short)atoi(words[1]))};
    where.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(listener, (struct sockaddr *)&where, sizeof where) || listen(listener, 128))
        return 1;
    for (;;) {
        int fd = accept(listener, NULL, NULL);
        pthread_t thread;
        if (fd >= 0 && !pthread_create(&thread, NULL, serve, (void *)(long)fd))
            pthread_detach(thread);
    }
}
