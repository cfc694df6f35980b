/**
 * What is compared, as shell commands. $IMG is the image, $DIR a directory of the tool's own in which its
 * repository is $DIR/repo, $OUT the file that a restore writes. Peers read the image from stdin where they
 * can: a disk has no name, size and times in a file cache that would tell them that nothing changed.
 */
export const OPERATIONS = {
  full: 'full snapshot',
  unchanged: 'unchanged snapshot',
  restore: 'restore to a file',
  restoreChecked: 'restore to a file, read back and compared',
  rollback: 'rollback of 1 % changed blocks',
  verify: 'verify all data',
};

const B2_ENV = {
  B2_REPOSITORY: '$DIR/repo',
  B2_CONFIG: '/dev/null',
  B2_CACHE_DIR: '$DIR/cache',
  // Where a machine sets it, every start of Node.js parses these certificates (0.05 s); b2 uses none here.
  NODE_EXTRA_CA_CERTS: '',
};

const b2 = (name, encryption, env) => ({
  name,
  program: 'b2',
  isOurs: true,
  env: { ...B2_ENV, ...env },
  setUp: `"$B2" init --encryption ${encryption}`,
  full: '"$B2" snapshot --quiet --volume bench/image "$IMG"',
  unchanged: '"$B2" snapshot --quiet --volume bench/image "$IMG"',
  // As the peers restore: what was written is not read back.
  restore: '"$B2" restore --quiet --no-verify bench/image "$OUT"',
  restoreChecked: '"$B2" restore --quiet bench/image "$OUT"',
  rollback: '"$B2" restore --quiet --no-verify --force bench/image "$OUT"',
  verify: '"$B2" verify --quiet --data all',
});

const borg = (name, create) => ({
  name,
  program: 'borg',
  env: {
    BORG_REPO: '$DIR/repo',
    BORG_PASSPHRASE: 'bench',
    BORG_BASE_DIR: '$DIR/base',
    BORG_DISPLAY_PASSPHRASE: 'no',
  },
  setUp: 'borg init -e repokey-blake2',
  full: `borg create ${create} -C lz4 ::first - <"$IMG"`,
  unchanged: `borg create ${create} -C lz4 ::second - <"$IMG"`,
  restore: 'mkdir -p "$DIR/x" && cd "$DIR/x" && borg extract --sparse ::first && mv stdin "$OUT"',
  verify: 'borg check --verify-data',
});

export const TOOLS = [
  b2('b2', 'aes256', { B2_PASSWORD: 'bench' }),
  b2('b2 unencrypted', 'none', {}),
  {
    name: 'restic',
    program: 'restic',
    env: {
      RESTIC_REPOSITORY: '$DIR/repo',
      RESTIC_PASSWORD: 'bench',
      RESTIC_CACHE_DIR: '$DIR/cache',
    },
    setUp: 'restic init --repository-version 2',
    full: 'restic backup -q --stdin --stdin-filename image <"$IMG"',
    unchanged: 'restic backup -q --stdin --stdin-filename image <"$IMG"',
    restore: 'restic restore -q latest --target "$DIR/x" && mv "$DIR/x/image" "$OUT"',
    verify: 'restic check -q --read-data',
  },
  borg('borg', '--files-cache disabled'),
  borg('borg fixed 64K', '--files-cache disabled --sparse --chunker-params fixed,65536'),
  {
    name: 'casync',
    program: 'casync',
    env: {},
    setUp: 'mkdir -p "$DIR/repo/x.castr"',
    full: 'casync make --store="$DIR/repo/x.castr" "$DIR/repo/first.caibx" "$IMG"',
    unchanged: 'casync make --store="$DIR/repo/x.castr" "$DIR/repo/second.caibx" "$IMG"',
    restore: 'casync extract --store="$DIR/repo/x.castr" "$DIR/repo/first.caibx" "$OUT"',
  },
];

/** The peers of which the better one is the measure. */
export const BETTER_OF = ['restic', 'borg', 'borg fixed 64K'];

/**
 * What C programs need for the parts of the work, each part alone: the image read and what is stored
 * written with direct I/O ($STORED bytes), hashed, compressed in blocks of 64 KiB, encrypted.
 */
export const PARTS = {
  readImage: 'dd if="$IMG" of=/dev/null bs=4M iflag=direct',
  catLz4: 'cat "$IMG" | lz4 -q -1 -B4 >"$DIR/x.lz4"',
  hash: 'b3sum --num-threads 2 "$IMG"',
  compress: 'lz4 -q -f -1 -B4 --no-frame-crc "$IMG" "$DIR/x.lz4"',
  writeStored:
    'dd if="$DIR/x.lz4" of="$DIR/stored" bs=4M count="$STORED" iflag=fullblock,count_bytes oflag=direct',
  readStored: 'dd if="$DIR/stored" of=/dev/null bs=4M iflag=direct',
  encrypt:
    'openssl enc -aes-256-ctr -nosalt -K 00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff' +
    ' -iv 000102030405060708090a0b0c0d0e0f -bufsize 65536 -in "$DIR/stored" -out /dev/null',
  decompress: 'lz4 -q -f -d "$DIR/x.lz4" /dev/null',
  writeImage: 'dd if="$IMG" of="$DIR/image" bs=1M conv=sparse oflag=direct',
};

/** What a part that measures only writing reads: it is brought into the page cache first. */
export const WARM = { writeStored: '"$DIR/x.lz4"', writeImage: '"$IMG"' };

/**
 * The limit of an operation from its parts. Hashing, compressing and encrypting count with their user time:
 * their system time is for passing data from one program to the next, which one program need not do.
 */
export const LIMITS = {
  full: { io: ['readImage', 'writeStored'], compute: ['hash', 'compress', 'encrypt'] },
  unchanged: { io: ['readImage'], compute: ['hash'] },
  restore: { io: ['readStored', 'writeImage'], compute: ['encrypt', 'decompress', 'hash'] },
  rollback: { io: ['readTarget'], compute: ['hash'] },
  verify: { io: ['readStored'], compute: ['encrypt', 'decompress', 'hash'] },
};

/** Read by the rollback, so measured where its target is there. */
export const READ_TARGET = 'dd if="$OUT" of=/dev/null bs=4M iflag=direct';

/** At most this ratio of b2 (encrypted) to the better of restic and borg, or to the limit, in one round. */
export const GOALS = [
  { operation: 'full', measure: 'elapsedS', to: 'peers', most: 0.4 },
  { operation: 'full', measure: 'cpuS', to: 'peers', most: 0.5 },
  { operation: 'restore', measure: 'elapsedS', to: 'peers', most: 0.4 },
  { operation: 'restore', measure: 'cpuS', to: 'peers', most: 0.3 },
  { operation: 'verify', measure: 'elapsedS', to: 'peers', most: 0.4 },
  { operation: 'verify', measure: 'cpuS', to: 'peers', most: 0.4 },
  { operation: 'full', measure: 'elapsedS', to: 'limit', most: 1.5 },
  { operation: 'full', measure: 'cpuS', to: 'limit', most: 1.5 },
];

/** Ratios that are shown without a goal. */
export const ALSO = [
  { operation: 'unchanged', measure: 'elapsedS', to: 'peers' },
  { operation: 'unchanged', measure: 'cpuS', to: 'peers' },
  { operation: 'rollback', measure: 'elapsedS', to: 'peers' },
  { operation: 'rollback', measure: 'cpuS', to: 'peers' },
  { operation: 'unchanged', measure: 'elapsedS', to: 'limit' },
  { operation: 'rollback', measure: 'elapsedS', to: 'limit' },
  { operation: 'restore', measure: 'elapsedS', to: 'limit' },
  { operation: 'restore', measure: 'cpuS', to: 'limit' },
  { operation: 'verify', measure: 'elapsedS', to: 'limit' },
  { operation: 'verify', measure: 'cpuS', to: 'limit' },
];
